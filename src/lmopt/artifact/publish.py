"""Write an artefact whole or not at all."""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lmopt import __version__
from lmopt.artifact import durable, staging
from lmopt.artifact.folder import is_artifact, walk
from lmopt.artifact.hashing import file_hash, in_parallel
from lmopt.artifact.manifest import (
    CONTENT,
    MANIFEST,
    OWN,
    SCHEMA,
    check_file_name,
    plain,
    read_manifest,
    render,
)
from lmopt.artifact.space import disk_full, free_bytes, means_full, require_space
from lmopt.errors import ArtifactError, ArtifactExistsError, CorruptArtifactError, DiskFullError
from lmopt.safefiles import check_gguf, check_onnx_external_data, check_safetensors

_OCCUPIED: Final = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})
_NOTHING_LEFT: Final = 1024 * 1024
"""Free bytes below which a file that was left short is blamed on the disk."""


@dataclass(frozen=True, slots=True)
class Staging:
    """An artefact in the making.

    Attributes:
        path: Folder to write files into; subfolders are welcome, links are not.
        manifest: Fill the objects `formats`, `measurements`, `model`, `parity`, `recipe`, `source`
            and `versions` with plain data. No times and no absolute paths, or two builds of one
            model differ.
    """

    path: Path
    manifest: dict[str, Any] = field(default_factory=lambda: {name: {} for name in CONTENT})


@contextmanager
def publish(target: str | os.PathLike[str], *, overwrite: bool = False, needed: int = 0) -> Iterator[Staging]:
    """Build an artefact beside its place and move it there in one step.

    At any moment, a power cut or `kill -9` included, the target is either as before or complete.
    On an exception nothing is left. What a killed process left is removed by the next `publish`
    to the same target.

    Args:
        target: Folder to create; its parents are made. A symbolic link is followed.
        overwrite: Replace an artefact that is there. Anything that lmopt did not write is never
            replaced, apart from an empty folder.
        needed: Bytes that will be written, as far as known, to refuse early.

    Yields:
        A `Staging`, whose folder becomes the artefact when the block ends.

    Raises:
        ArtifactExistsError: Something is at the target that must not be replaced.
        DiskFullError: The disk is full; the message has needed and free bytes.
        ArtifactError: A file or manifest entry cannot be published, or the disk fails.
        CorruptArtifactError: A model file was written incompletely.
    """
    target = Path(os.path.abspath(target))
    target = target.resolve() if target.is_symlink() else target
    require_space(target, needed)
    try:
        durable.make_folders(target.parent)
        staging.sweep(target.parent, target)
        _check_target(target, overwrite)
        folder, aside, lock = staging.create(target)
    except ArtifactError:
        raise
    except OSError as error:
        if means_full(error):
            raise disk_full(target, max(needed, 1), free_bytes(target)) from error
        raise ArtifactError(f"{target.parent} cannot be written ({error}). Choose another folder.") from error
    draft = Staging(folder)
    try:
        yield draft
        _finish(draft, target, aside, overwrite)
    except BaseException as error:
        full = _shortage(error, folder, needed)
        shutil.rmtree(folder, ignore_errors=True)
        if full is not None:
            raise full from error
        raise
    finally:
        os.close(lock)


def _finish(draft: Staging, target: Path, aside: Path, overwrite: bool) -> None:
    """Seal the staging folder and move it into place."""
    try:
        _seal(draft)
        replace = _check_target(target, overwrite)
        durable.move_into_place(draft.path, target, aside, replace=replace)
    except ArtifactError:
        raise
    except OSError as error:
        if means_full(error):
            raise
        if error.errno in _OCCUPIED:
            raise _exists(target, "it appeared while this one was built") from error
        raise ArtifactError(f"{target} could not be written ({error}); nothing was left there.") from error


def _seal(draft: Staging) -> None:
    """Check, hash and sync every file, then write the manifest."""
    if unknown := draft.manifest.keys() - {*CONTENT}:
        own = sorted(unknown & {*OWN})
        why = "lmopt fills it itself" if own else f"known are {', '.join(CONTENT)}"
        raise ArtifactError(f"the manifest field {(own or sorted(unknown))[0]!r} cannot be set: {why}.")
    # The umask as the folder shows it: asking for it would change it for other threads.
    folder_mode = stat.S_IMODE(draft.path.stat().st_mode)
    file_mode = folder_mode & 0o666

    def finish(name: str) -> tuple[str, dict[str, Any]]:
        path = draft.path / name
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise ArtifactError(f"{path} is a link or no regular file; an artefact holds copies only.")
        check_file_name(name, str(draft.path))
        check_complete(path)
        durable.sync(path, mode=file_mode)
        digest, size = file_hash(path)
        return name, {"sha256": digest, "bytes": size}

    manifest = {name: plain(draft.manifest.get(name, {}), name) for name in CONTENT}
    files = dict(in_parallel(finish, sorted(walk(draft.path))))
    manifest |= {"schema": SCHEMA, "created_by": f"lmopt {__version__}", "files": files}
    for parent in sorted({parent for name in files for parent in (draft.path / name).parents}, reverse=True):
        if parent != draft.path and parent.is_relative_to(draft.path):
            durable.sync(parent, mode=folder_mode)
    durable.write(draft.path / MANIFEST, render(manifest), mode=file_mode)
    durable.sync(draft.path)


def check_complete(path: Path) -> None:
    """Catch a model file that its writer left short, as some do on a full disk without a word.

    Raises:
        CorruptArtifactError: The file ends too early or is malformed.
    """
    if path.suffix == ".safetensors":
        check_safetensors(path)
    elif path.suffix == ".gguf":
        check_gguf(path)
    elif path.suffix == ".onnx":
        check_onnx_external_data(path)


def _check_target(target: Path, overwrite: bool) -> bool:
    """Say whether the target holds an artefact that is to be replaced; refuse anything else."""
    if not os.path.lexists(target) or (target.is_dir() and not os.listdir(target)):
        return False
    if not target.is_dir() or not is_artifact(target):
        raise _exists(target, "lmopt did not write what is there")
    if not overwrite:
        raise ArtifactExistsError(f"{target} holds an artefact already. Pass overwrite=True to replace it.")
    try:
        listed = read_manifest(target / MANIFEST)["files"]
    except CorruptArtifactError as error:
        raise _exists(
            target, f"its manifest is damaged, so what else is there is unknown ({error})"
        ) from error
    if strange := [name for name in walk(target) if name not in listed and name != MANIFEST]:
        raise _exists(target, f"lmopt did not write {strange[0]!r} in it")
    return True


def _exists(target: Path, reason: str) -> ArtifactExistsError:
    """Make the error for a target that is never replaced."""
    return ArtifactExistsError(
        f"{target} is not replaced: {reason}. Choose another folder, or remove it first: rm -r {target}"
    )


def _shortage(error: BaseException, folder: Path, needed: int) -> DiskFullError | None:
    """Return the error to raise if a full disk is behind `error`, while the files are still there."""
    free = free_bytes(folder)
    cut_short = isinstance(error, ArtifactError) and free < _NOTHING_LEFT
    if not cut_short and not means_full(error):
        return None
    written = sum(one.lstat().st_size for one in folder.rglob("*") if one.is_file())
    return disk_full(folder.parent, max(needed, written + 1), free)
