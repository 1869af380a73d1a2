"""How much memory a piece of work needs at its peak, and how much disk an artefact takes."""

import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_PROCESSES = Path("/proc")
# Blocks that are being measured: a reset for an inner one must not take the peak from the others.
_active: list["PeakMemory"] = []


def resident_memory_bytes(process: int | None = None) -> int:
    """Read the memory that a process holds now.

    Args:
        process: Its id; `None` is this process. What another one holds is known on Linux only.

    Returns:
        Bytes. Where the system does not say: the peak of this process, 0 of another one.
    """
    return _status("VmRSS", process) or _lifetime_peak(process)


def peak_memory_bytes(process: int | None = None) -> int:
    """Read the most memory that a process has held, since its start or since the last reset.

    Args:
        process: As for `resident_memory_bytes`.
    """
    return _status("VmHWM", process) or _lifetime_peak(process)


def reset_peak(process: int | None = None) -> bool:
    """Start `peak_memory_bytes` afresh.

    Args:
        process: As for `resident_memory_bytes`.

    Returns:
        Whether the system allowed it: Linux does, unless a container forbids it.
    """
    try:
        (_folder(process) / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def folder_size_bytes(folder: Path) -> int:
    """Add up the sizes of the files below a folder, or give the size of a file.

    A file that is reached twice through hard links counts once; links to other places count what
    they point to.

    Args:
        folder: Folder or file.
    """
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    sizes = {(info.st_dev, info.st_ino): info.st_size for info in (path.stat() for path in files)}
    return sum(sizes.values())


class PeakMemory:
    """Measures the peak memory of the process during a `with` block.

    Where the kernel's own peak can be reset, that is exact. Elsewhere a thread samples the resident
    memory, and a spike shorter than the interval can be missed; `exact` says which it was.

    Args:
        interval_s: Seconds between two samples.

    Attributes:
        before_bytes: Resident memory at the start of the block.
        peak_bytes: Largest resident memory during it; valid after the block.
        exact: Whether the kernel measured it.
    """

    def __init__(self, *, interval_s: float = 0.01) -> None:
        self.before_bytes = 0
        self.peak_bytes = 0
        self.exact = False
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def added_bytes(self) -> int:
        """Peak above what the process held at the start."""
        return max(0, self.peak_bytes - self.before_bytes)

    def __enter__(self) -> Self:
        """Begin to measure."""
        for outer in _active:
            outer.peak_bytes = max(outer.peak_bytes, peak_memory_bytes() if outer.exact else 0)
        _active.append(self)
        self.exact = reset_peak()
        self.before_bytes = self.peak_bytes = resident_memory_bytes()
        if not self.exact:
            self._stop.clear()
            self._thread = threading.Thread(target=self._sample, name="lmopt-peak-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and fix the peak."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        _active.remove(self)
        last = peak_memory_bytes() if self.exact else resident_memory_bytes()
        self.peak_bytes = max(self.peak_bytes, last)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak_bytes = max(self.peak_bytes, resident_memory_bytes())


def _folder(process: int | None) -> Path:
    return _PROCESSES / ("self" if process is None else str(process))


def _status(name: str, process: int | None = None) -> int:
    """A field of a process's `status` file in bytes, 0 where there is none."""
    try:
        text = (_folder(process) / "status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return 0


def _lifetime_peak(process: int | None = None) -> int:
    """Peak since this process started, on any POSIX system, which cannot be reset; 0 of another one."""
    if process is not None:
        return 0
    import resource  # POSIX only, and only needed where there is no /proc

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
