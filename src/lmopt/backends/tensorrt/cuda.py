"""The few calls of the CUDA runtime that the engine makes, each with its answer checked.

Nothing else in lmopt imports `cuda`. Addresses and handles are plain integers on this side.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, Final

import cuda.bindings.runtime as runtime  # type: ignore[import-untyped]
import numpy as np

from lmopt.errors import DeviceError
from lmopt.types import AnyArray

_OUT_OF_MEMORY: Final = runtime.cudaError_t.cudaErrorMemoryAllocation
_UNLOADING: Final = runtime.cudaError_t.cudaErrorCudartUnloading


class OutOfDeviceMemoryError(Exception):
    """An allocation failed; whoever asked for it knows what it was for, and says so."""


def use_device(index: int) -> None:
    """Make a device the one that this thread's calls go to.

    Raises:
        DeviceError: It is not there, or does not start.
    """
    _checked("cudaSetDevice", runtime.cudaSetDevice(index))


def free_memory() -> int:
    """Count the bytes that are free on the current device."""
    free, _ = _checked("cudaMemGetInfo", runtime.cudaMemGetInfo())
    return int(free)


def allocate(size: int) -> int:
    """Allocate bytes on the current device, aligned to 256 bytes; give their address.

    Raises:
        OutOfDeviceMemoryError: There are not as many.
    """
    return int(_checked("cudaMalloc", runtime.cudaMalloc(size))[0])


def free(address: int) -> None:
    """Give device memory back; waits for the device."""
    _checked("cudaFree", runtime.cudaFree(address))


@dataclass(frozen=True, slots=True)
class Planes:
    """A box of bytes in device memory: lines at a fixed distance, in planes at a fixed distance.

    Attributes:
        address: Of the first byte.
        pitch: Bytes from a line to the next.
        lines: Lines from a plane to the next.
    """

    address: int
    pitch: int
    lines: int


class Stream:
    """A stream of the current device that does not wait for the default one; and copies on it.

    Every method that takes addresses returns before the work is done: what it names must live, and stay as it
    is, until `wait` has returned.
    """

    def __init__(self) -> None:
        # Held as the binding's own object: the graph calls take it, TensorRT takes its number.
        (self._stream,) = _checked(
            "cudaStreamCreateWithFlags", runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)
        )

    @property
    def handle(self) -> int:
        """What TensorRT takes."""
        return int(self._stream)

    def wait(self) -> None:
        """Wait until everything that was asked of the stream is done."""
        _checked("cudaStreamSynchronize", runtime.cudaStreamSynchronize(self._stream))

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy bytes between any two memories; host memory should be pinned."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
        _checked("cudaMemcpyAsync", runtime.cudaMemcpyAsync(to, source, size, kind, self._stream))

    def copy_box(self, to: Planes, source: Planes, width: int, height: int, depth: int) -> None:
        """Copy `depth` planes of `height` lines of `width` bytes; empty boxes are left alone."""
        if not (width and height and depth):
            return
        box = runtime.cudaMemcpy3DParms()
        box.srcPtr = _pitched(source, width)
        box.dstPtr = _pitched(to, width)
        extent = runtime.cudaExtent()
        extent.width, extent.height, extent.depth = width, height, depth
        box.extent = extent
        box.kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
        _checked("cudaMemcpy3DAsync", runtime.cudaMemcpy3DAsync(box, self._stream))

    def clear(self, address: int, size: int) -> None:
        """Write zeros."""
        _checked("cudaMemsetAsync", runtime.cudaMemsetAsync(address, 0, size, self._stream))

    def begin_capture(self) -> None:
        """Write down what follows instead of doing it; other threads may go on calling CUDA."""
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked("cudaStreamBeginCapture", runtime.cudaStreamBeginCapture(self._stream, mode))

    def end_capture(self) -> "CapturedGraph":
        """Give what was written down, ready to be launched.

        Raises:
            DeviceError: Something in it cannot be captured.
        """
        (graph,) = _checked("cudaStreamEndCapture", runtime.cudaStreamEndCapture(self._stream))
        try:
            (executable,) = _checked("cudaGraphInstantiate", runtime.cudaGraphInstantiate(graph, 0))
        finally:
            _checked("cudaGraphDestroy", runtime.cudaGraphDestroy(graph))
        return CapturedGraph(executable)

    def drop_capture(self) -> None:
        """End a capture that went wrong and forget it; the stream can be used again."""
        error, graph = runtime.cudaStreamEndCapture(self._stream)
        if error == runtime.cudaError_t.cudaSuccess and graph is not None and int(graph):
            _checked("cudaGraphDestroy", runtime.cudaGraphDestroy(graph))
        runtime.cudaGetLastError()  # it would otherwise be reported by whoever asks next

    def launch(self, graph: "CapturedGraph") -> None:
        """Do what was written down."""
        _checked("cudaGraphLaunch", runtime.cudaGraphLaunch(graph.executable, self._stream))

    def destroy(self) -> None:
        """Give the stream back; it must not be used again."""
        _checked("cudaStreamDestroy", runtime.cudaStreamDestroy(self._stream))


class CapturedGraph:
    """Work that was captured from a stream, with its addresses and shapes fixed."""

    def __init__(self, executable: Any) -> None:
        self.executable = executable

    def destroy(self) -> None:
        """Give it back; it must not be running."""
        _checked("cudaGraphExecDestroy", runtime.cudaGraphExecDestroy(self.executable))


class PinnedMemory:
    """Host memory that the device reads and writes by itself.

    Args:
        size: Bytes, at least 1.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        flags = runtime.cudaHostAllocDefault
        self.address = int(_checked("cudaHostAlloc", runtime.cudaHostAlloc(size, flags))[0])

    def array(self, dtype: str, shape: tuple[int, ...], offset: int = 0) -> AnyArray:
        """Show a part as an array; it must not be used after `free`."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = (ctypes.c_uint8 * count).from_address(self.address + offset)
        found: AnyArray = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
        return found

    def free(self) -> None:
        """Give it back."""
        _checked("cudaFreeHost", runtime.cudaFreeHost(self.address))


def _pitched(planes: Planes, width: int) -> Any:
    pointer = runtime.cudaPitchedPtr()
    pointer.ptr, pointer.pitch = planes.address, planes.pitch
    pointer.xsize, pointer.ysize = width, planes.lines
    return pointer


def _checked(call: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give what a call answered besides its error code."""
    error, *values = result
    if error == runtime.cudaError_t.cudaSuccess or error == _UNLOADING:
        return tuple(values)
    if error == _OUT_OF_MEMORY:
        raise OutOfDeviceMemoryError(call)
    _, words = runtime.cudaGetErrorString(error)
    said = words.decode() if isinstance(words, bytes) else str(words)
    raise DeviceError(
        f"{call} failed: {error.name} ({int(error)}): {said}. After such an error the process may be unable "
        "to use the GPU: start it anew; `lmopt doctor` says what is usable"
    )
