"""Device memory that is given out again before it is given back: the same sizes come by for every token."""

import contextlib
import math
import threading
import weakref
from collections import deque
from typing import Final

from lmopt.backends.tensorrt import cuda
from lmopt.errors import ClosedError, DeviceError, InsufficientMemoryError

ALIGNMENT: Final = 256
"""Bytes to which TensorRT wants every address aligned; cudaMalloc aligns to no less."""
_MOST_IDLE: Final = 16
"""Buffers that are kept for the next one who wants their size."""


def aligned(size: int) -> int:
    """Round bytes up to the alignment; at least one unit, as TensorRT takes no null address."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


class Buffer:
    """Bytes on the device; they go back to their `Memory` when nothing refers to this object any more.

    Attributes:
        address: Of the first byte, a multiple of 256.
        size: Bytes.
    """

    def __init__(self, memory: "Memory", address: int, size: int) -> None:
        self.address = address
        self.size = size
        # When the process ends, the driver takes everything back, and may be gone before finalisers run.
        weakref.finalize(self, memory.give_back, address, size).atexit = False


class Memory:
    """What one engine holds on its device.

    The last buffer of a size that came back is the first to be given out again, so that a state that is made anew
    for each token finds itself at one of a few addresses: a captured graph is good for one.

    Args:
        device: Index of the device, for messages; it must be the current one when memory is taken.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._idle: dict[int, list[int]] = {}
        self._closed = False
        self.held = 0
        # Filled by finalisers, which may run anywhere, even inside `take`: nothing but an append happens there.
        self._returned: deque[tuple[int, int]] = deque()

    def take(self, size: int, what: str) -> Buffer:
        """Give bytes of any content.

        Args:
            size: Bytes; rounded up to 256.
            what: What they are for.

        Raises:
            InsufficientMemoryError: The device has not as much left.
            ClosedError: The engine is closed.
        """
        size = aligned(size)
        with self._lock:
            if self._closed:
                raise ClosedError("this engine is closed; open a new lmopt.Runtime")
            self._sort_in()
            if fitting := self._idle.get(size):
                return Buffer(self, fitting.pop(), size)
            try:
                address = self._allocate(size)
            except cuda.OutOfDeviceMemoryError:
                raise InsufficientMemoryError(
                    f"{what} needs {_mebibytes(size)} of memory on cuda:{self._device}; "
                    f"{_mebibytes(cuda.free_memory())} are free there. To fit: use a smaller batch, a shorter "
                    "max_new_tokens or max_length, or shorter prompts; or close what else uses this GPU"
                ) from None
            self.held += size
            return Buffer(self, address, size)

    def give_back(self, address: int, size: int) -> None:
        """Take a buffer back that nobody uses any more; called by its finaliser."""
        self._returned.append((address, size))
        if self._closed:
            # A finaliser has nobody to tell; a device that fails here says so at its next use.
            with contextlib.suppress(DeviceError):
                self._free_returned()

    def close(self) -> None:
        """Free what is idle, and from now on whatever comes back."""
        with self._lock:
            self._closed = True
            self._free_returned()
            self._free_idle()

    def _allocate(self, size: int) -> int:
        try:
            return cuda.allocate(size)
        except cuda.OutOfDeviceMemoryError:
            self._free_idle()
            return cuda.allocate(size)

    def _sort_in(self) -> None:
        """Put what came back among the idle, and free everything idle if it is much."""
        while self._returned:
            address, size = self._returned.popleft()
            self._idle.setdefault(size, []).append(address)
        if sum(map(len, self._idle.values())) > _MOST_IDLE:
            self._free_idle()

    def _free_idle(self) -> None:
        for size, addresses in self._idle.items():
            for address in addresses:
                cuda.free(address)
                self.held -= size
        self._idle.clear()

    def _free_returned(self) -> None:
        while True:
            try:
                address, size = self._returned.popleft()
            except IndexError:
                return
            cuda.free(address)
            self.held -= size


def _mebibytes(count: int) -> str:
    return f"{math.ceil(count / (1 << 20)):,d} MiB"
