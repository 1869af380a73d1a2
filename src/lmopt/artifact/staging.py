"""Staging folders: named so that they are found again, locked so that a dead owner is noticed."""

import fcntl
import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Final

_LONGEST_NAME: Final = 200
"""Longest target name, in bytes, that is repeated in the staging folder's name (of at most 255)."""


def stem_of(target: Path) -> str:
    """Return the part of a staging folder's name that says which target it is for."""
    raw = os.fsencode(target.name)
    return target.name if len(raw) <= _LONGEST_NAME else hashlib.sha256(raw).hexdigest()


def create(target: Path) -> tuple[Path, Path, int]:
    """Make and lock an empty staging folder beside the target.

    The lock, not the process id in the name, tells a living owner from a dead one: ids are used
    again, and mean nothing to a process in another container.

    Returns:
        The folder, a free name beside it for `move_into_place`, and the descriptor that holds the
        lock; close it when the folder is published or removed.
    """
    while True:
        token = f"{os.getpid()}-{secrets.token_hex(4)}"
        folder = target.parent / f".{stem_of(target)}.tmp-{token}"
        folder.mkdir()
        lock = _lock(folder)
        if lock is not None:
            return folder, target.parent / f".{stem_of(target)}.old-{token}", lock


def sweep(parent: Path, target: Path | None = None) -> None:
    """Remove what killed processes left beside a target; put back an old artefact moved aside.

    Args:
        parent: Folder of the target.
        target: The target, or `None` for all targets in a folder that belongs to lmopt.
    """
    name = "(.+)" if target is None else f"({re.escape(stem_of(target))})"
    pattern = re.compile(rf"\.{name}\.(tmp|old)-([0-9]+-[0-9a-f]{{8}})", re.DOTALL)
    for entry in sorted(os.listdir(parent)):
        match = pattern.fullmatch(entry)
        if match is None:
            continue
        found, staging = parent / entry, parent / f".{match[1]}.tmp-{match[3]}"
        lock = _lock(staging)
        if lock is None and staging.exists():
            continue  # its owner lives
        try:
            if match[2] == "old" and target is not None and not os.path.lexists(target):
                os.rename(found, target)
            else:
                shutil.rmtree(found, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder for this process, or return `None` if it is gone or another holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None
