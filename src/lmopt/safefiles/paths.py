"""Keep every file that a model names inside the model's folder."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from lmopt.errors import ArtifactNotFoundError, CorruptArtifactError, UnsafeArtifactError

HUB_DEPTH = 8
"""Folders above a file that are searched for the `snapshots` folder of a Hugging Face cache."""


def contained(
    folder: str | os.PathLike[str],
    name: str,
    *,
    allow_symlinks_into: str | os.PathLike[str] | None = None,
    allow_hardlinks: bool = True,
) -> Path:
    """Turn a name found inside a model into the path of a regular file of its folder.

    Args:
        folder: Folder of the model.
        name: Relative name with `/` between its parts, as a file of the model states it.
        allow_symlinks_into: One more folder that symbolic links may lead into; see `hub_blobs`.
        allow_hardlinks: Whether the file may have a second name elsewhere. Give `False` where the
            file's bytes are taken unexamined, since its other name may be outside the folder.

    Returns:
        Path of the file below the canonical `folder`.

    Raises:
        CorruptArtifactError: The name cannot be a file name.
        UnsafeArtifactError: The name or a link leads out of the folder, or to something that is
            not a regular file.
        ArtifactNotFoundError: There is no such file.
    """
    where = f"{os.fspath(folder)}: the file name {name!r}"
    if not name or "\0" in name:
        raise CorruptArtifactError(f"{where} is not a file name. Get a fresh copy of the model.")
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise UnsafeArtifactError(
            f"{where} leads out of the model folder; it must be a relative name without '..' or a "
            f"backslash. Do not use this model unless you trust its origin and repair the name."
        )
    try:
        root = Path(folder).resolve(strict=True)
        real = (root / name).resolve(strict=True)
        status = real.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactNotFoundError(f"{where} does not exist. Get a complete copy of the model.") from error
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, no such encoding
        raise CorruptArtifactError(f"{where} cannot be opened ({error}).") from error
    allowed = [root] if allow_symlinks_into is None else [root, Path(allow_symlinks_into).resolve()]
    if not any(real.is_relative_to(one) for one in allowed):
        raise UnsafeArtifactError(
            f"{where} is a link to {real}, outside the model folder. "
            f"If that file is meant, replace the link by a copy of it."
        )
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeArtifactError(f"{where} is not a regular file.")
    if status.st_nlink > 1 and not allow_hardlinks:
        raise UnsafeArtifactError(
            f"{where} is a hard link: its bytes belong to another file too, perhaps outside the folder. "
            f"If that is meant, copy the folder: cp -r --no-preserve=links OLD NEW"
        )
    return root / name


def hub_blobs(folder: str | os.PathLike[str]) -> Path | None:
    """Find where the links of a Hugging Face cache snapshot lead, for `allow_symlinks_into`.

    The cache keeps `models--x--y/snapshots/<revision>/config.json` as a link into
    `models--x--y/blobs`.

    Args:
        folder: Folder of the model, such as `snapshots/<revision>` or one below it.

    Returns:
        The `blobs` folder beside `snapshots`, or `None` where there is no such layout.
    """
    path = Path(folder).resolve()
    for parent in (path, *path.parents)[:HUB_DEPTH]:
        blobs = parent.parent.parent / "blobs"
        if parent.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return blobs
    return None


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[tuple[FileIO, int]]:
    """Open a regular file for reading without ever waiting on a pipe or a device.

    Yields:
        The unbuffered file, and its size in bytes.

    Raises:
        ArtifactNotFoundError: There is no such file.
        UnsafeArtifactError: It is a folder, a pipe, a device, or may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactNotFoundError(f"{os.fspath(path)}: no such file.") from error
    except OSError as error:
        raise UnsafeArtifactError(f"{os.fspath(path)} cannot be read ({error.strerror}).") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnsafeArtifactError(f"{os.fspath(path)} is not a regular file.")
    with open(descriptor, "rb", buffering=0) as file:
        yield file, status.st_size
