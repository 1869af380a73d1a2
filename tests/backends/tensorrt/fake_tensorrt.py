"""TensorRT's run half on ONNX Runtime's CPU kernels, harsher than a real one.

Outputs that overlap inputs, and addresses that are not aligned, are errors; a context whose shapes changed must run
uncaptured once before it is captured, and its captured graph is dead when they change again.
"""

import contextlib
import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnxruntime as ort
import tensorrt_rtx_bindings as rtx
from tensorrt_tests_fake_cuda import FakeRuntime, WrongError  # by conftest.py

from lmopt.types import DTYPE_BYTES


def numpy_type(dtype: str) -> np.dtype:
    """Give NumPy's type of a tensor; bfloat16 is one that ONNX Runtime's CPU computes as float32."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


class FakeLog:
    """What `logger_for` makes."""

    native = object()

    def __init__(self) -> None:
        self.lines: list[str] = []

    def errors(self):
        return tuple(self.lines)

    def clear(self):
        self.lines.clear()


class FakeTensorRT:
    """A flavour's module: what the run half uses of it. Plans are names of graphs that `add` was told."""

    __name__ = "tensorrt_rtx_bindings"
    ExecutionContextAllocationStrategy = rtx.ExecutionContextAllocationStrategy
    TensorIOMode = rtx.TensorIOMode
    TensorLocation = rtx.TensorLocation
    DataType = rtx.DataType

    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime
        self.log = FakeLog()
        self.plans: dict[bytes, tuple[Any, Any]] = {}
        self.contexts = 0
        self.on_config = lambda settings: None
        self.refuse: set[str] = set()

    def Runtime(self, native):  # noqa: N802
        if native is not FakeLog.native:
            raise WrongError("the runtime was not given the logger's native half")
        return SimpleNamespace(deserialize_cuda_engine=self.load)

    def load(self, data: bytes):
        if data not in self.plans:
            self.log.lines.append("this is no plan of mine")
            return None
        return FakeEngine(self, *self.plans[data])


class FakeEngine:
    """`ICudaEngine` over one ONNX file."""

    TYPES: ClassVar = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "bfloat16": "BF16"}

    def __init__(self, trt: FakeTensorRT, plan: Any, session: ort.InferenceSession) -> None:
        self.trt = trt
        self.plan = plan
        self.session = session
        self.tensors = {one.name: one for one in (*plan.inputs, *plan.outputs)}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(plan.profiles)
        self.device_memory_size_v2 = 1000

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        inputs = {one.name for one in self.plan.inputs}
        return rtx.TensorIOMode.INPUT if name in inputs else rtx.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return getattr(rtx.DataType, self.TYPES[self.tensors[name].dtype])

    def get_tensor_location(self, name):
        return rtx.TensorLocation.HOST if f"host {name}" in self.trt.refuse else rtx.TensorLocation.DEVICE

    def create_execution_context(self, settings):
        if settings != rtx.ExecutionContextAllocationStrategy.USER_MANAGED and not isinstance(
            settings, FakeConfig
        ):
            raise WrongError(f"a context with {settings}")
        if "context" in self.trt.refuse:
            return None
        self.trt.on_config(settings)
        self.trt.contexts += 1
        return FakeContext(self)

    def create_runtime_config(self):
        return FakeConfig()


class FakeConfig:
    """`IRuntimeConfig` of RTX."""

    cuda_graph_strategy = None
    strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class FakeContext:
    """`IExecutionContext`: answers as the documentation says, and runs the graph on ONNX Runtime."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.runtime = engine.trt.runtime
        self.profile = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.version = 0
        self.settled = -1
        self.workspace = None
        self.busy = threading.Lock()

    def no(self, words: str) -> bool:
        self.engine.trt.log.lines.append(words)
        return False

    def set_optimization_profile_async(self, index, stream):
        if not 0 <= index < len(self.engine.plan.profiles):
            return self.no("no such profile")
        self.profile = self.engine.plan.profiles[index]
        self.shapes.clear()
        return True

    def set_device_memory(self, address, size):
        if size < self.engine.device_memory_size_v2 or address % 256:
            raise WrongError("too little, or not aligned, scratch memory")
        self.workspace = address, size

    def symbols(self):
        found = {}
        for spec in self.engine.plan.inputs:
            for axis, size in zip(spec.shape, self.shapes[spec.name], strict=True):
                if isinstance(axis, str) and found.setdefault(axis, size) != size:
                    raise WrongError(f"{axis} is {found[axis]} and {size}")
        return found

    def set_input_shape(self, name, shape):
        if self.profile is None:
            raise WrongError("a shape before a profile")
        if name in self.engine.trt.refuse:
            return self.no(f"shape of {name} refused")
        one = self.profile
        total = tuple(sum(pair) for pair in zip(one.sequence, one.past, strict=True))
        ranges = {
            "batch_size": one.batch,
            "sequence_length": one.sequence,
            "past_sequence_length": one.past,
            "total_sequence_length": total,
        }
        spec = self.engine.tensors[name]
        for axis, size in zip(spec.shape, shape, strict=True):
            least, _, most = ranges[axis] if isinstance(axis, str) else (axis, axis, axis)
            if not least <= size <= most:
                return self.no(f"{name}: {size} is not in {least}..{most} of profile {one.name}")
        if self.shapes.get(name) != tuple(shape):
            self.shapes[name] = tuple(shape)
            self.version += 1
        return True

    def infer_shapes(self):
        return [one.name for one in self.engine.plan.inputs if one.name not in self.shapes]

    def get_tensor_shape(self, name):
        spec = self.engine.tensors[name]
        if name in self.shapes:
            return self.shapes[name]
        known = self.symbols()
        past = known.get("past_sequence_length", 0)
        known["total_sequence_length"] = past + known["sequence_length"]
        wrong = 1 if f"shape {name}" in self.engine.trt.refuse else 0
        return tuple(known[axis] if isinstance(axis, str) else axis + wrong for axis in spec.shape)

    def set_tensor_address(self, name, address):
        if not address or address % 256:
            raise WrongError(f"{name} at {address:#x}, which is not aligned")
        self.addresses[name] = address
        return True

    def span(self, name):
        count = int(np.prod(self.get_tensor_shape(name))) * DTYPE_BYTES[self.engine.tensors[name].dtype]
        return self.addresses[name], count

    def execute_async_v3(self, stream):
        if "run" in self.engine.trt.refuse:
            return self.no("the run was refused")
        if stream not in self.runtime.streams:
            raise WrongError("no stream of this device")
        if self.infer_shapes() or set(self.addresses) != set(self.engine.tensors) or self.workspace is None:
            raise WrongError("a run without all shapes, addresses and scratch memory")
        capturing = stream in self.runtime.capturing
        if capturing and self.settled != self.version:
            raise WrongError("a context is captured whose shapes are new to it")
        if capturing and "capture" in self.engine.trt.refuse:
            return self.no("this cannot be captured")
        if not capturing:
            self.settled = self.version
        spans = {name: self.span(name) for name in self.engine.tensors}
        inputs = [spans[one.name] for one in self.engine.plan.inputs]
        for one in self.engine.plan.outputs:
            start, count = spans[one.name]
            if any(start < other + size and other < start + count for other, size in inputs):
                raise WrongError(f"the output {one.name} overlaps an input")
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.tensors}
        version, spot = self.version, dict(self.addresses)
        self.runtime.queue(stream, lambda: self.compute(version, spans, shapes, spot))
        return True

    def compute(self, version, spans, shapes, spot):
        if version != self.version or spot != self.addresses:
            raise WrongError(
                "a context was changed before what it was asked for was done, or after it was captured"
            )
        with contextlib.ExitStack() as stack:
            if not self.busy.acquire(blocking=False):
                raise WrongError("one context in two threads")
            stack.callback(self.busy.release)
            self.runtime.device(*self.workspace).fill(0xFF)
            feeds = {}
            for spec in self.engine.plan.inputs:
                raw = self.runtime.device(spans[spec.name][0], max(1, spans[spec.name][1]))
                raw = raw[: spans[spec.name][1]]
                value = raw.view(numpy_type(spec.dtype)).reshape(shapes[spec.name])
                value = value.astype("float32" if spec.dtype == "bfloat16" else spec.dtype)
                feeds[spec.name] = value
                if value.dtype.kind == "f" and not np.isfinite(value).all():
                    raise WrongError(f"{spec.name} is not finite: memory that nobody wrote to is read")
            names = [one.name for one in self.engine.plan.outputs]
            for name, value in zip(names, self.engine.session.run(names, feeds), strict=True):
                if value.shape != shapes[name]:
                    raise WrongError(f"{name} has the shape {value.shape}; {shapes[name]} was said")
                start, count = spans[name]
                value = np.ascontiguousarray(value, numpy_type(self.engine.tensors[name].dtype))
                self.runtime.device(start, count)[:] = value.reshape(-1).view(np.uint8)
