"""A GPU that is not there: CUDA's runtime in NumPy, and TensorRT's run half on ONNX Runtime's CPU kernels.

It is harsher than a real one, so that mistakes show. What is queued on a stream is done when the stream is waited
for, and not before; new memory is full of NaN; addresses that were not given out, or not aligned, or outputs that
overlap inputs, are errors; a context whose shapes changed must run uncaptured once before it is captured, and its
captured graph is dead when they change again.
"""

import bisect
import contextlib
import itertools
import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import cuda.bindings.runtime as real
import numpy as np
import onnxruntime as ort
import tensorrt_rtx_bindings as rtx

from lmopt.types import DTYPE_BYTES

OK = real.cudaError_t.cudaSuccess
FULL = real.cudaError_t.cudaErrorMemoryAllocation
INVALID = real.cudaError_t.cudaErrorInvalidValue

FORMER: set[int] = set()
"""Addresses of fakes that are gone: what still holds them, a traceback say, may free them."""


class WrongError(AssertionError):
    """The engine did what a GPU would not forgive."""


class FakeRuntime:
    """The calls of `cuda.bindings.runtime` that `lmopt.backends.tensorrt.cuda` makes, on host memory.

    Constants, enums and structures are the real ones.
    """

    def __init__(self, memory: int = 256 << 20) -> None:
        self.capacity = memory
        self.lock = threading.RLock()
        self.current = threading.local()
        self.blocks: dict[int, np.ndarray] = {}
        self.starts: list[int] = []
        self.host: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Any]] = {}
        self.capturing: dict[int, list[Any]] = {}
        self.capturers: dict[int, int] = {}
        self.graphs: dict[int, list[Any]] = {}
        self.numbers = itertools.count(0x1000)
        self.calls: dict[str, int] = {}
        self.fail: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(real, name)
        if name.startswith("cuda") and callable(value) and not isinstance(value, type):
            raise WrongError(f"the fake does not know {name}")
        return value

    def enter(self, name: str, *, needs_device: bool = True) -> Any:
        """Count a call; give the error that a test wants it to have."""
        with self.lock:
            self.calls[name] = self.calls.get(name, 0) + 1
        if needs_device and not hasattr(self.current, "device"):
            raise WrongError(f"{name} in a thread that chose no device")
        return self.fail.get(name, OK)

    # Devices ------------------------------------------------------------------------------------

    def cudaGetDeviceCount(self):  # noqa: N802
        return OK, 1

    def cudaDriverGetVersion(self):  # noqa: N802
        return OK, 13000

    def cudaRuntimeGetVersion(self):  # noqa: N802
        return OK, 13040

    def cudaGetDeviceProperties(self, index):  # noqa: N802
        return OK, SimpleNamespace(
            name=b"Fake GPU", major=8, minor=9, totalGlobalMem=self.capacity, multiProcessorCount=2
        )

    def cudaSetDevice(self, index):  # noqa: N802
        error = self.enter("cudaSetDevice", needs_device=False)
        self.current.device = index
        return (error,)

    def cudaGetLastError(self):  # noqa: N802
        return (OK,)

    def cudaGetErrorString(self, error):  # noqa: N802
        return OK, b"the fake was told to fail"

    # Memory -------------------------------------------------------------------------------------

    def cudaMemGetInfo(self):  # noqa: N802
        self.enter("cudaMemGetInfo")
        return OK, self.capacity - self.used(), self.capacity

    def used(self) -> int:
        with self.lock:
            return sum(one.size for one in self.blocks.values())

    def cudaMalloc(self, size):  # noqa: N802
        error = self.enter("cudaMalloc")
        with self.lock:
            if error != OK or self.used() + size > self.capacity:
                return FULL, None
            if threading.get_ident() in self.capturers.values():
                raise WrongError("memory is allocated in a thread that captures a stream")
            raw = np.full(size + 256, 0xFF, np.uint8)
            start = -raw.ctypes.data % 256
            block = raw[start : start + size]
            address = block.ctypes.data
            FORMER.discard(address)
            self.blocks[address] = block
            bisect.insort(self.starts, address)
            return OK, address

    def cudaFree(self, address):  # noqa: N802
        self.enter("cudaFree", needs_device=False)
        with self.lock:
            if address in FORMER:
                return (OK,)
            if address not in self.blocks:
                raise WrongError(f"{address:#x} is freed and was not given out, or twice")
            self.blocks.pop(address)[:] = 0xFF
            self.starts.remove(address)
        return (OK,)

    def cudaHostAlloc(self, size, flags):  # noqa: N802
        self.enter("cudaHostAlloc")
        block = np.full(size, 0xFF, np.uint8)
        with self.lock:
            self.host[block.ctypes.data] = block
        return OK, block.ctypes.data

    def cudaFreeHost(self, address):  # noqa: N802
        self.enter("cudaFreeHost", needs_device=False)
        with self.lock:
            # Work that is queued on it, and would be done late, finds nothing there.
            self.host.pop(address)[:] = 0xFF
        return (OK,)

    def device(self, address: int, size: int) -> np.ndarray:
        """Show device memory, if all of it was given out."""
        with self.lock:
            index = bisect.bisect_right(self.starts, address) - 1
            if index >= 0:
                start = self.starts[index]
                if address + size <= start + self.blocks[start].size:
                    return self.blocks[start][address - start : address - start + size]
        raise WrongError(f"{size} bytes at {address:#x} are not memory of the device")

    def anywhere(self, address: int, size: int) -> np.ndarray:
        """Show memory of the device or pinned memory."""
        with self.lock:
            for start, block in self.host.items():
                if start <= address and address + size <= start + block.size:
                    return block[address - start : address - start + size]
        return self.device(address, size)

    # Streams ------------------------------------------------------------------------------------

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        self.enter("cudaStreamCreateWithFlags")
        if flags != real.cudaStreamNonBlocking:
            raise WrongError("a stream that waits for the default one")
        handle = next(self.numbers)
        with self.lock:
            self.streams[handle] = []
        return OK, real.cudaStream_t(handle)

    def queue(self, stream: Any, work: Any) -> None:
        handle = int(stream)
        with self.lock:
            self.capturing.get(handle, self.streams[handle]).append(work)

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        error = self.enter("cudaStreamSynchronize")
        if int(stream) in self.capturing:
            raise WrongError("a stream is waited for while it is captured")
        with self.lock:
            work, self.streams[int(stream)] = self.streams[int(stream)], []
        for one in work:
            one()
        return (error,)

    def cudaStreamDestroy(self, stream):  # noqa: N802
        self.enter("cudaStreamDestroy", needs_device=False)
        with self.lock:
            if self.streams.pop(int(stream)):
                raise WrongError("a stream is destroyed with work in it")
        return (OK,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):  # noqa: N802
        error = self.enter("cudaMemcpyAsync")

        def work():
            self.anywhere(to, size)[:] = self.anywhere(source, size)

        self.anywhere(to, size), self.anywhere(source, size)
        self.queue(stream, work)
        return (error,)

    def cudaMemsetAsync(self, address, value, size, stream):  # noqa: N802
        error = self.enter("cudaMemsetAsync")
        self.queue(stream, lambda: self.device(address, size).fill(value))
        return (error,)

    def cudaMemcpy3DAsync(self, box, stream):  # noqa: N802
        error = self.enter("cudaMemcpy3DAsync")
        extent = box.extent
        sizes = extent.depth, extent.height, extent.width
        ends = []
        for pointer in (box.dstPtr, box.srcPtr):
            if extent.height > 1 and pointer.pitch < extent.width:
                return (INVALID,)
            if extent.depth > 1 and pointer.ysize < extent.height:
                return (INVALID,)
            strides = pointer.pitch * pointer.ysize, pointer.pitch, 1
            ends.append((int(pointer.ptr), strides))

        def shown(end):
            address, strides = end
            last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            flat = self.anywhere(address, last + 1)
            return np.lib.stride_tricks.as_strided(flat, sizes, strides)

        to, source = ends
        shown(to), shown(source)
        self.queue(stream, lambda: shown(to).__setitem__(..., shown(source).copy()))
        return (error,)

    # Graphs -------------------------------------------------------------------------------------

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        self.enter("cudaStreamBeginCapture")
        with self.lock:
            self.capturing[int(stream)] = []
            self.capturers[int(stream)] = threading.get_ident()
        return (OK,)

    def cudaStreamEndCapture(self, stream):  # noqa: N802
        error = self.enter("cudaStreamEndCapture")
        with self.lock:
            work = self.capturing.pop(int(stream), None)
            self.capturers.pop(int(stream), None)
            if work is None or error != OK:
                return (error if error != OK else INVALID), None
            handle = next(self.numbers)
            self.graphs[handle] = work
        return OK, real.cudaGraph_t(handle)

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        error = self.enter("cudaGraphInstantiate")
        handle = next(self.numbers)
        with self.lock:
            self.graphs[handle] = self.graphs[int(graph)]
        return error, real.cudaGraphExec_t(handle)

    def cudaGraphDestroy(self, graph):  # noqa: N802
        with self.lock:
            del self.graphs[int(graph)]
        return (OK,)

    def cudaGraphExecDestroy(self, graph):  # noqa: N802
        with self.lock:
            del self.graphs[int(graph)]
        return (OK,)

    def cudaGraphLaunch(self, graph, stream):  # noqa: N802
        error = self.enter("cudaGraphLaunch")
        for work in self.graphs[int(graph)]:
            self.queue(stream, work)
        return (error,)


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
                feeds[spec.name] = raw.view(spec.dtype).reshape(shapes[spec.name]).copy()
                if feeds[spec.name].dtype.kind == "f" and not np.isfinite(feeds[spec.name]).all():
                    raise WrongError(f"{spec.name} is not finite: memory that nobody wrote to is read")
            names = [one.name for one in self.engine.plan.outputs]
            for name, value in zip(names, self.engine.session.run(names, feeds), strict=True):
                if value.shape != shapes[name]:
                    raise WrongError(f"{name} has the shape {value.shape}; {shapes[name]} was said")
                start, count = spans[name]
                self.runtime.device(start, count)[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
