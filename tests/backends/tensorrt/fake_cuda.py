"""CUDA's runtime on host memory, harsher than a real one, so that mistakes show.

What is queued on a stream is done when the stream is waited for, and not before; new memory is full of NaN; addresses
that were not given out are errors; a graph is captured without allocating.
"""

import bisect
import itertools
import threading
from types import SimpleNamespace
from typing import Any

import cuda.bindings.runtime as real
import numpy as np

OK = real.cudaError_t.cudaSuccess
FULL = real.cudaError_t.cudaErrorMemoryAllocation
INVALID = real.cudaError_t.cudaErrorInvalidValue

FORMER: dict[int, Any] = {}
"""What fakes that are gone had given out, by address or handle, and kept so that none is given out again: what still
holds it, a traceback say, may free it late."""
_NUMBERS = itertools.count(0x1000)


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

    def retire(self) -> None:
        """Keep what was not given back, for whoever gives it back when the next fake is there."""
        for given in (self.blocks, self.host, self.streams, self.graphs):
            FORMER.update(given)

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
            self.blocks[address] = block
            bisect.insort(self.starts, address)
            return OK, address

    def cudaFree(self, address):  # noqa: N802
        self.enter("cudaFree", needs_device=False)
        with self.lock:
            if FORMER.pop(address, None) is not None:
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
            block = FORMER.pop(address) if address in FORMER else self.host.pop(address)
            block[:] = 0xFF
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
        handle = next(_NUMBERS)
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
            if int(stream) not in FORMER and self.streams.pop(int(stream)):
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
            handle = next(_NUMBERS)
            self.graphs[handle] = work
        return OK, real.cudaGraph_t(handle)

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        error = self.enter("cudaGraphInstantiate")
        handle = next(_NUMBERS)
        with self.lock:
            self.graphs[handle] = self.graphs[int(graph)]
        return error, real.cudaGraphExec_t(handle)

    def cudaGraphDestroy(self, graph):  # noqa: N802
        with self.lock:
            if int(graph) not in FORMER:
                del self.graphs[int(graph)]
        return (OK,)

    def cudaGraphExecDestroy(self, graph):  # noqa: N802
        with self.lock:
            if int(graph) not in FORMER:
                del self.graphs[int(graph)]
        return (OK,)

    def cudaGraphLaunch(self, graph, stream):  # noqa: N802
        error = self.enter("cudaGraphLaunch")
        for work in self.graphs[int(graph)]:
            self.queue(stream, work)
        return (error,)
