"""What this process holds, as the kernel sees it."""

import ctypes
import gc
import os
from pathlib import Path

import numpy as np

WINDOWS = 5


def resident() -> int:
    """Bytes in memory, after a collection, without what the C allocator keeps for later."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Open file descriptors."""
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    """Threads of the process, those of native libraries included."""
    return len(os.listdir("/proc/self/task"))


def slope(readings: list[int]) -> float:
    """Bytes an iteration, after a warm-up of a tenth: the median of the lines through a few windows.

    A leak goes on in every window; an allocator that reaches its size grows by a step in one or two.
    """
    kept = np.array(readings[len(readings) // 10 :], np.float64)
    lines = [np.polyfit(np.arange(part.size), part, 1)[0] for part in np.array_split(kept, WINDOWS)]
    return float(np.median(lines))
