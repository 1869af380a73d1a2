"""The few steps between a finished folder and one that is there after a power cut."""

import ctypes
import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Final

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_NO_EXCHANGE: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


def sync(path: Path, *, mode: int | None = None) -> None:
    """Give a file or folder its permissions and wait until it is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if mode is not None and stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes, *, mode: int) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def make_folders(folder: Path) -> None:
    """Make a folder and its missing parents, each on the disk before the next."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def move_into_place(staging: Path, target: Path, aside: Path, *, replace: bool) -> None:
    """Put a finished folder at its place in one step, and remove what it replaces.

    A new folder is renamed, which fails if anything but an empty folder is there. An old one is
    exchanged with the new (Linux, `renameat2`). On a file system without the exchange the old one
    is moved aside first: the target is absent for an instant, and after a crash in that instant
    the next `publish` to the target puts the old one back.

    Args:
        staging: Finished folder beside the target.
        target: Where it belongs.
        aside: Free name beside the target, for the file systems without the exchange.
        replace: Whether the folder at the target is to be replaced.
    """
    swapped = replace and exchange(staging, target)
    if not swapped:
        if replace:
            os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            if replace:
                os.rename(aside, target)
            raise
    try:
        sync(target.parent)
    except OSError:  # whether the new folder would survive a power cut is unknown: take it back
        if swapped:
            exchange(staging, target)
        else:
            os.rename(target, staging)
            if replace:
                os.rename(aside, target)
        raise
    if replace:
        shutil.rmtree(staging if swapped else aside, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; `False` where this system cannot.

    Raises:
        OSError: It can, but failed.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), os.fspath(one), None, os.fspath(other))
