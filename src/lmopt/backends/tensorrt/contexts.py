"""Execution contexts of TensorRT, told their shapes and addresses once, and only what changed after that."""

from collections.abc import Mapping
from typing import Any

from lmopt.backends.tensorrt.cuda import Stream
from lmopt.backends.tensorrt.loading import Loaded, Shape
from lmopt.backends.tensorrt.memory import Buffer


class Context:
    """One execution context, of one profile, used on one stream.

    Args:
        loaded: Engine.
        profile: Number of the profile.
        stream: Where it runs.
        workspace: Memory that it may write to while it runs; contexts of one stream share it.

    Raises:
        EngineError: TensorRT refuses.
    """

    def __init__(self, loaded: Loaded, profile: int, stream: Stream, workspace: Buffer) -> None:
        self._loaded = loaded
        self._stream = stream
        self._workspace = workspace
        self._native: Any = loaded.new_context()
        self._shape: Shape | None = None
        self._addresses: dict[str, int] = {}
        if not self._native.set_optimization_profile_async(profile, stream.handle):
            raise loaded.failed(f"TensorRT does not take profile {profile}")
        self._native.set_device_memory(workspace.address, workspace.size)

    def prepare(self, shape: Shape, addresses: Mapping[str, int]) -> None:
        """Set what the next run is to work on.

        Args:
            shape: Sizes, of this context's profile.
            addresses: Address of every input and output.

        Raises:
            EngineError: TensorRT refuses a shape, or would write more or less than there is room for.
        """
        if shape != self._shape:
            self._shape = None
            for spec in self._loaded.plan.inputs:
                if not self._native.set_input_shape(spec.name, shape.of(spec)):
                    raise self._loaded.failed(
                        f"TensorRT does not take the shape {shape.of(spec)} for {spec.name!r}"
                    )
            if unknown := self._native.infer_shapes():
                raise self._loaded.failed(f"TensorRT cannot infer the shapes of {', '.join(unknown)}")
            for spec in self._loaded.plan.outputs:
                given = tuple(self._native.get_tensor_shape(spec.name))
                if given != shape.of(spec):
                    raise self._loaded.failed(
                        f"the engine would write {spec.name!r} in the shape {given}; expected {shape.of(spec)}"
                    )
            self._shape = shape
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._native.set_tensor_address(name, address):
                    raise self._loaded.failed(f"TensorRT does not take an address for {name!r}")
                self._addresses[name] = address

    def run(self) -> None:
        """Queue one run on the stream.

        Raises:
            EngineError: TensorRT refuses.
        """
        if not self._native.execute_async_v3(self._stream.handle):
            assert self._shape is not None
            rows, tokens = self._shape.batch, self._shape.sequence
            raise self._loaded.failed(f"TensorRT failed on {rows} rows of {tokens} tokens")
