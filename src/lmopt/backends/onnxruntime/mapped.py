"""Give memory back that holds nothing but what stands in a file."""

import contextlib
import mmap
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_MAPS: Final = Path("/proc/self/smaps")
_HEAD: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)")


def forget_mapped_pages(files: Iterable[Path]) -> None:
    """Drop the pages of files that this process has mapped; those that are read again come back.

    ONNX Runtime maps the weights, and most kernels then lay them out anew in memory of their own. A
    matrix that is looked up as well, as a tied embedding is, stays mapped, and whole, although a text
    reads a few of its rows. Mappings that were written to are left alone; where the system is not
    Linux nothing happens.

    Args:
        files: Files whose mappings are dropped.
    """
    names = {str(path.resolve()) for path in files}
    if not names or not sys.platform.startswith("linux"):
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end in _clean_mappings(_MAPS.read_text(encoding="utf-8", errors="surrogateescape"), names):
            madvise(start, end - start, mmap.MADV_DONTNEED)


def _clean_mappings(smaps: str, names: set[str]) -> list[tuple[int, int]]:
    """Find the address ranges that map one of the files and hold no page of their own."""
    found = []
    where: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if line[0].isupper():
            if where is not None and line.split() == ["Anonymous:", "0", "kB"]:
                found.append(where)
        else:
            head = _HEAD.fullmatch(line)
            where = (int(head[1], 16), int(head[2], 16)) if head and head[3] in names else None
    return found
