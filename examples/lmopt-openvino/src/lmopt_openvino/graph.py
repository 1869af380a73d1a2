"""Read an exported graph into OpenVINO, make it ready for decoding, compile it, and check what came out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmopt.contracts import EngineReport, EngineRequest
from lmopt.errors import (
    ArtifactNotFoundError,
    ClosedError,
    EngineError,
    InputError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.mappings import opening
from lmopt.safefiles import check_onnx_external_data, onnx_boundary
from lmopt.signature import LOGITS, Signature, Step, bytes_per_token
from lmopt.types import AnyArray, IntArray, TensorSpec
from lmopt_openvino.attention import keep_cache_inside
from lmopt_openvino.heads import POSITIONS, choose_positions
from lmopt_openvino.settings import check_precision, check_properties, executed, settings_for
from lmopt_openvino.silent import ov
from lmopt_openvino.weights import keep_weights_small

MODEL = "model.onnx"
_HALVES = (ov.Type.f16, ov.Type.bf16)


class Graph:
    """The `onnx` format of an artefact, compiled.

    Args:
        request: Asks for an artefact that has the format.

    Attributes:
        signature: Roles of inputs and outputs.
        fused: Whether OpenVINO keeps keys and values itself, in the request that computes.
        chooses: Whether the graph computes the logits of chosen positions only.

    Raises:
        CorruptArtifactError: A file is damaged.
        UnsupportedError: The graph is of another dialect.
        UnsupportedPrecisionError: OpenVINO would compute in another type than was asked for.
        EngineError: OpenVINO refuses the graph.
    """

    def __init__(self, request: EngineRequest) -> None:
        if request.artifact is None:
            raise ArtifactNotFoundError(
                "backend 'openvino' runs exported artefacts; write one with lmopt.Exporter('onnx').export(model, "
                "folder), or give the model to lmopt.Runtime, which does it"
            )
        self._record: Mapping[str, Any] = request.artifact.manifest["formats"]["onnx"]
        self.settings = settings_for(request, self._record.get("dtype", "float32"))
        if (target := self._record.get("target", "portable")) != "portable":
            raise UnsupportedError(
                f"backend 'openvino' reads the dialect 'portable'; this artefact is {target!r}. Export the model with "
                "lmopt.Exporter('onnx', target='portable'), or lmopt export MODEL OUT --target portable"
            )
        self._path = request.artifact.file(MODEL)
        check_onnx_external_data(self._path, allow_hardlinks=True)
        files = [
            request.artifact.file(name) for name in self._record.get("files", ())
        ]  # verifies their hashes
        self.signature = Signature.from_graph(*(_in_float32(specs) for specs in onnx_boundary(self._path)))
        forget = opening(files)
        model = self._read()
        if keep_weights_small(model) and self.settings.group_size:
            raise UnsupportedOptionError(
                "dynamic_quantization_group_size has no effect on weights with float offsets, which this artefact "
                "has; leave it out, or quantize with whole zeros (zero='integer', symmetric=True)"
            )
        self.chooses = choose_positions(model)
        self.fused = self._record.get("dtype") == "float32" and keep_cache_inside(model, self.signature)
        self._compiled = self._compile(model)
        del model
        # Most products have laid their weights out anew by now; what is mapped still comes back when it is read.
        forget()
        self.layers = executed(self._compiled)
        check_precision(self.layers, self.settings.dtype)

    def _read(self) -> Any:
        try:
            model = ov.Core().read_model(str(self._path))
            if all(one.get_element_type() not in _HALVES for one in (*model.inputs, *model.outputs)):
                return model
            # The caller's side is float32, whatever the graph computes in.
            edges = ov.preprocess.PrePostProcessor(model)
            for index, one in enumerate(model.inputs):
                if one.get_element_type() in _HALVES:
                    edges.input(index).tensor().set_element_type(ov.Type.f32)
            for index, one in enumerate(model.outputs):
                if one.get_element_type() in _HALVES:
                    edges.output(index).tensor().set_element_type(ov.Type.f32)
            return edges.build()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO {ov.__version__} cannot read {self._path}: {error}") from error

    def _compile(self, model: Any) -> Any:
        try:
            compiled = ov.Core().compile_model(model, "CPU", self.settings.properties())
        except RuntimeError as error:
            raise EngineError(f"OpenVINO {ov.__version__} cannot compile {self._path}: {error}") from error
        check_properties(compiled, self.settings)
        return compiled

    def request(self) -> Any:
        """Make what computes: it has its own inputs, outputs and, if `fused`, its own cache.

        Raises:
            ClosedError: The graph is closed.
        """
        return self.compiled().create_infer_request()

    def compiled(self) -> Any:
        """Give the compiled graph; whoever holds it keeps it alive, also through `close`."""
        if self._compiled is None:
            raise ClosedError("this engine is closed; open a new lmopt.Runtime")
        return self._compiled

    def feeds(self, step: Step, *, last_only: bool) -> dict[str, AnyArray]:
        """Lay out the inputs of one call, without the state's."""
        feeds = dict(step.feeds)
        if self.chooses:
            batch, width = feeds["input_ids"].shape
            columns: Any = np.broadcast_to(np.arange(width)[None, :, None], (batch, width, 1))
            # What brings logits to the caller's layout brings column numbers there, too.
            feeds[POSITIONS] = step.align(columns, last_only=last_only)[..., 0]
        return feeds

    def run(self, request: Any, feeds: Mapping[str, Any]) -> None:
        """Compute; results are read from the request.

        Raises:
            ClosedError: The graph is closed.
            EngineError: OpenVINO fails.
        """
        self.compiled()
        tensors = {
            name: ov.Tensor(np.require(value, requirements=["C", "W"]), shared_memory=True)
            for name, value in feeds.items()
        }
        try:
            for name, tensor in tensors.items():
                request.set_tensor(name, tensor)
            request.infer(share_outputs=True, decode_strings=False)
        except RuntimeError as error:
            rows, tokens = feeds["input_ids"].shape
            raise EngineError(f"OpenVINO failed on {rows} rows of {tokens} tokens: {error}") from error

    def logits(self, request: Any, step: Step, *, last_only: bool) -> AnyArray:
        """Take the logits, in the caller's layout and memory, from a request that has computed."""
        given = request.get_tensor(LOGITS).data
        if self.chooses:
            return np.array(given)
        return np.array(step.align(given, last_only=last_only))

    def taps(self, input_ids: IntArray, names: Sequence[str]) -> dict[str, AnyArray]:
        """Run ids from an empty state, with the named modules' outputs added to the graph's."""
        self.compiled()
        known = dict(self._record.get("taps", ()))
        if unknown := set(names) - set(known):
            raise InputError(f"the graph cannot show {min(unknown)!r}; tap_names() lists what it can")
        model = self._read()
        values = dict.fromkeys(known[name] for name in names)
        ports = {}
        for value in values:
            present = next((one for one in model.outputs if value in one.get_names()), None)
            ports[value] = present or model.add_outputs([value])[0]
        batch, width = input_ids.shape
        state = self.signature.begin(batch)
        step = self.signature.step(input_ids, np.full(batch, width, np.int64), state)
        request = self._compile(model).create_infer_request()
        self.run(request, {**step.feeds, **state.tensors})
        return {name: np.array(request.get_tensor(known[name]).data) for name in names}

    def tap_names(self) -> list[str]:
        """Names of the modules that the exporter noted down."""
        return [name for name, _ in self._record.get("taps", ())]

    def report(self) -> EngineReport:
        """Say what computes, in OpenVINO's own words."""
        compiled = self.compiled()
        products = [one for one in self.layers if one["layerType"] == "FullyConnected"]
        details = {
            "execution_devices": compiled.get_property("EXECUTION_DEVICES"),
            "cpu": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
            "weights": dict(Counter(one["runtimePrecision"] for one in products)),
            "state": ("keys and values in the request" if self.fused else "arrays between calls"),
            "kv_cache_dtype": self.settings.dtype if self.fused else "float32",
            "kv_cache_bytes_per_token": bytes_per_token(self.signature.state)
            // (2 if self.fused and self.settings.dtype != "float32" else 1),
            "dynamic_quantization_group_size": self.settings.group_size,
            "pinning": self.settings.pinning,
        }
        versions = {"openvino": _version()}
        return EngineReport("openvino", "cpu", self.settings.dtype, self.settings.threads, versions, details)

    def close(self) -> None:
        """Let go of the compiled graph."""
        self._compiled = None


def _version() -> str:
    from importlib.metadata import version

    return version("openvino")


def _in_float32(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The caller's side of the graph, as `_read` makes it."""
    halves = ("float16", "bfloat16")
    return [TensorSpec(one.name, "float32" if one.dtype in halves else one.dtype, one.shape) for one in specs]
