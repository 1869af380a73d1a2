"""Open an artefact and prove, before anything reads it, that it is what was written."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from lmopt.artifact.hashing import file_hash, in_parallel
from lmopt.artifact.manifest import MANIFEST, read_manifest
from lmopt.errors import ArtifactNotFoundError, CorruptArtifactError
from lmopt.safefiles import contained, hub_blobs
from lmopt.types import ModelFacts

TOLERATED: Final = frozenset({".cache", ".git", ".gitattributes", ".gitignore"})
"""What git and the Hugging Face client put into a folder; no model loader reads these."""


def is_artifact(path: str | os.PathLike[str]) -> bool:
    """Say whether a folder claims to be an artefact, without reading it."""
    return os.path.isfile(os.path.join(path, MANIFEST))


class Artifact:
    """A folder with a valid manifest. Make one with `Artifact.open`.

    Attributes:
        path: Canonical folder.
        manifest: Content of `lmopt.json`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._blobs = hub_blobs(path)
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> "Artifact":
        """Open an artefact.

        Args:
            path: Its folder.
            verify: Hash every file now. With `False` each file is hashed when `file` first hands
                it out, which saves reading those that are never used.

        Raises:
            ArtifactNotFoundError: There is no artefact; the message says what is there instead.
            CorruptArtifactError: The manifest or a file is damaged, missing, or not listed.
            UnsafeArtifactError: A link leaves the folder.
        """
        folder = Path(path)
        if not is_artifact(folder):
            raise ArtifactNotFoundError(f"{folder} is not an lmopt artefact: {_describe(folder)}")
        folder = folder.resolve()
        manifest = contained(folder, MANIFEST, allow_symlinks_into=hub_blobs(folder))
        artifact = cls(folder, read_manifest(manifest))
        artifact._check_listing()
        if verify:
            artifact.verify()
        return artifact

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats that it holds, sorted, such as `("onnx", "safetensors")`."""
        return tuple(sorted(self.manifest["formats"]))

    @property
    def facts(self) -> ModelFacts:
        """Facts of the model.

        Raises:
            CorruptArtifactError: The manifest does not state them.
        """
        try:
            return ModelFacts.from_dict(self.manifest["model"])
        except TypeError as error:
            raise CorruptArtifactError(f"{self.path / MANIFEST}: the field 'model': {error}.") from error

    def file(self, name: str) -> Path:
        """Return the path of a listed file, contained in the folder and verified once.

        Raises:
            ArtifactNotFoundError: The artefact lists no such file.
            CorruptArtifactError: Its size or hash differs.
            UnsafeArtifactError: It is a link that leaves the folder.
        """
        entry = self.manifest["files"].get(name)
        if entry is None:
            listed = ", ".join(self.manifest["files"]) or "none"
            raise ArtifactNotFoundError(f"{self.path} has no file {name!r}. It has: {listed}.")
        with self._lock:
            if name in self._verified:
                return self.path / name
        try:
            path = contained(self.path, name, allow_symlinks_into=self._blobs)
        except ArtifactNotFoundError as error:
            raise CorruptArtifactError(
                f"{self.path / name} is missing. Copy or export the artefact again."
            ) from error
        size = path.stat().st_size
        if size == entry["bytes"]:
            digest, size = file_hash(path)
        if size != entry["bytes"]:
            raise CorruptArtifactError(
                f"{path} has {size} bytes, {entry['bytes']} were written. It is damaged: "
                f"copy or export the artefact again."
            )
        if digest != entry["sha256"]:
            raise CorruptArtifactError(
                f"{path} is not as it was written: its sha256 is {digest}, recorded is {entry['sha256']}. "
                f"It was damaged or changed: copy or export the artefact again."
            )
        with self._lock:
            self._verified.add(name)
        return path

    def verify(self) -> None:
        """Hash every file now, also those that were verified before.

        Raises:
            CorruptArtifactError: A file is damaged, missing, or not listed.
            UnsafeArtifactError: A link leaves the folder.
        """
        self._check_listing()
        with self._lock:
            self._verified.clear()
        files = self.manifest["files"]
        # The biggest first: it alone sets how long the whole takes.
        in_parallel(self.file, sorted(files, key=lambda name: -files[name]["bytes"]))

    def _check_listing(self) -> None:
        """Refuse files that the manifest does not list: a loader might read them."""
        for name in walk(self.path):
            if name != MANIFEST and name not in self.manifest["files"] and name not in TOLERATED:
                raise CorruptArtifactError(
                    f"{self.path}: the file {name!r} is not part of the artefact: {MANIFEST} does not "
                    f"list it. Move it elsewhere, or export the artefact again."
                )


def walk(folder: Path) -> Iterator[str]:
    """Yield the `/`-separated names of all files and links below a folder.

    Folders named in `TOLERATED` are yielded as if they were files and not entered.
    """
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False) and name not in TOLERATED:
                    pending.append(name + "/")
                else:
                    yield name


def _describe(folder: Path) -> str:
    """Say what a path holds that is no artefact, and what to do with it."""
    if not os.path.lexists(folder):
        return "there is nothing. Check the path."
    if not folder.is_dir():
        return f"it is no folder. Load it with lmopt.Model.from_pretrained({os.fspath(folder)!r})."
    names = sorted(os.listdir(folder))
    if not names:
        return "the folder is empty. Export a model into it first."
    if "config.json" in names:
        return (
            f"it looks like a Hugging Face folder. Load it with "
            f"lmopt.Model.from_pretrained({os.fspath(folder)!r}) and export that."
        )
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{MANIFEST} is missing; the folder has {shown}."
