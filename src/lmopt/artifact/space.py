"""Disk space: ask before writing, and recognise a full disk by whatever name an engine calls it."""

import errno
import os
import shutil
from pathlib import Path
from typing import Final

from lmopt.errors import DiskFullError

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No space, quota used up, size limit of the process (RLIMIT_FSIZE)."""
FULL_TEXTS: Final = (
    "no space left on device",
    "disk quota exceeded",
    "file too large",
    "(os error 28)",
    "(os error 122)",
    "(os error 27)",
)
"""How native libraries put it in errors that are not `OSError`, in lower case."""


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes that this user may still write at `path`, which need not exist yet."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(folder: str | os.PathLike[str], needed: int) -> None:
    """Refuse early when `needed` bytes do not fit where `folder` is or will be.

    Raises:
        DiskFullError: They do not; the message has both numbers.
    """
    free = free_bytes(folder)
    if needed > free:
        raise disk_full(folder, needed, free)


def disk_full(folder: str | os.PathLike[str], needed: int, free: int) -> DiskFullError:
    """Make the error, with the numbers and the way out."""
    error = DiskFullError(
        f"{os.fspath(folder)}: the disk is full: {needed} bytes are needed, {free} are free. Nothing was "
        f"left behind. Free some space (df -h {os.fspath(folder)}) or choose a folder on another disk."
    )
    error.errno = errno.ENOSPC
    return error


def means_full(error: BaseException) -> bool:
    """Say whether an error, or one that it was raised from, comes from a full disk."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in FULL:
            return True
        text = str(current).lower()
        if isinstance(current, Exception) and any(one in text for one in FULL_TEXTS):
            return True
        current = current.__cause__ or current.__context__
    return False
