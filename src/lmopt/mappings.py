"""Give memory back that holds nothing but what stands in a file.

Weights are mapped from their files, by transformers as by ONNX Runtime. Once they have been read, the whole
file counts as memory of the process, although pages that nobody has written to can be dropped at any
time: the next access maps them again out of the system's page cache. Linux only; elsewhere nothing happens.

Only mappings of a known owner may be dropped, one that cannot go meanwhile: see `opening`.
"""

import contextlib
import mmap
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MAPS: Final = Path("/proc/self/smaps")
# Looking for the pages of less costs more than they are worth.
_LARGE: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class FileMapping:
    """A mapping of a file that still is the file's content.

    Attributes:
        start: First address.
        end: Address behind the last.
        path: The file.
        writable: Whether this process may write to it.
        private: Whether what it writes is its own.
        resident_bytes: Bytes of it that are in memory.
    """

    start: int
    end: int
    path: str
    writable: bool
    private: bool
    resident_bytes: int


def drop_unwritten(wanted: Callable[[FileMapping], bool]) -> int:
    """Drop the pages of mappings that nobody has written to; those that are read again come back.

    Args:
        wanted: Chooses among them. One that another thread may be about to write to, or to unmap, must not be
            chosen.

    Returns:
        Bytes of memory that were given back.
    """
    if not sys.platform.startswith("linux"):
        return 0
    import ctypes

    given = 0
    with contextlib.suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for one in unwritten(_MAPS.read_text(encoding="utf-8", errors="surrogateescape")):
            if wanted(one) and advise(one.start, one.end - one.start, mmap.MADV_DONTNEED) == 0:
                given += one.resident_bytes
    return given


_maps = Counter[str]()
_maps_lock = threading.Lock()


def opening(files: Iterable[Path]) -> Callable[[], None]:
    """Tell that an engine is about to map files; what is given, once they are read, drops their pages.

    A mapping may only be dropped while nobody unmaps it: its addresses may belong to other memory a moment later,
    which would be wiped. So nothing is dropped of a file that this process opens for a second time, since the first
    engine may be going right now; and whoever opens one waits while others drop theirs.

    Args:
        files: Files that will be mapped.

    Returns:
        A function without arguments, to be called while the mappings are in use.
    """
    paths = [path.resolve() for path in files]
    names = {str(path) for path in paths}
    large = sum(path.stat().st_size for path in paths if path.is_file()) >= _LARGE
    with _maps_lock:
        _maps.update(names)

    def forget() -> None:
        with _maps_lock:
            alone = {name for name in names if large and _maps[name] == 1}
            if alone:
                drop_unwritten(lambda one: one.path in alone)

    return forget


def return_freed() -> None:
    """Give the system what has been freed: after reading a large file that is tens of megabytes."""
    if sys.platform.startswith("linux"):
        import ctypes

        with contextlib.suppress(OSError, AttributeError):  # of glibc only
            ctypes.CDLL(None).malloc_trim(0)


def unwritten(smaps: str) -> Iterator[FileMapping]:
    """Find the mappings of files that hold no page of their own in what `/proc/self/smaps` says."""
    head: list[str] = []
    resident = 0
    for line in smaps.splitlines():
        name, _, value = line.partition(":")
        if name == "Rss":
            resident = 1024 * int(value.split()[0])
        elif name == "Anonymous":
            # Addresses, permissions, offset, device, inode, path; the inode of what is no file is 0.
            if len(head) == 6 and head[4] != "0" and value.split()[0] == "0":
                start, end = (int(part, 16) for part in head[0].split("-"))
                yield FileMapping(start, end, head[5], "w" in head[1], head[1].endswith("p"), resident)
        elif not line.split(maxsplit=1)[0].endswith(":"):
            head, resident = line.split(maxsplit=5), 0
