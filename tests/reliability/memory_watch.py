"""What this process holds, as the kernel sees it."""

import gc
import os
from pathlib import Path

import numpy as np


def resident() -> int:
    """Bytes in memory, after a collection."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Open file descriptors."""
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    """Threads of the process, those of native libraries included."""
    return len(os.listdir("/proc/self/task"))


def slope(readings: list[int]) -> float:
    """Bytes an iteration of a line through the readings that follow a warm-up of a tenth."""
    kept = np.array(readings[len(readings) // 10 :], np.float64)
    return float(np.polyfit(np.arange(kept.size), kept, 1)[0])
