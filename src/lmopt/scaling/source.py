"""The model of a corpus job: a path that every worker can open, and what proves that it is the same model."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmopt.artifact import MANIFEST, Artifact, is_artifact
from lmopt.artifact.hashing import file_hash, in_parallel
from lmopt.errors import UnsupportedError
from lmopt.model import Model
from lmopt.opening import export_for
from lmopt.registry import backends


@dataclass(frozen=True, slots=True)
class Source:
    """A model for workers.

    Attributes:
        place: What a worker gives to `lmopt.Runtime`.
        identity: Hash of the model that was asked for.
        backend: The engine, by name; `None` leaves the choice to `Runtime`.
    """

    place: str
    identity: str
    backend: str | None


def resolve(
    model: str | os.PathLike[str] | Model | Artifact,
    *,
    backend: str | None,
    device: str,
    dtype: str,
    trust: bool,
    scratch: Path,
    progress: Callable[[str, int, int], None],
) -> Source:
    """Turn what a user calls a model into something that other processes can open.

    An export that the engine needs is made here, once, and not by every worker.

    Args:
        model: As for `lmopt.Runtime`.
        backend: As for `lmopt.Runtime`.
        device: As for `lmopt.Runtime`.
        dtype: As for `lmopt.Runtime`.
        trust: As for `lmopt.Runtime`.
        scratch: Folder for a copy of a live model.
        progress: As for `lmopt.Runtime`.

    Raises:
        UnsupportedError: A live module of an own class cannot be handed to other processes.
    """
    if not isinstance(model, Model | Artifact) and is_artifact(model):
        model = Artifact.open(model, verify=False)
    formats = None if backend is None else backends.require(backend).can.formats
    if isinstance(model, Artifact):
        identity = file_hash(model.path / MANIFEST)[0]
        if formats is None or "module" in formats or set(formats) & set(model.formats):
            return Source(str(model.path), identity, backend)
        place: str | Path = model.path
    elif isinstance(model, Model):
        identity = model.fingerprint()
        if formats is None or "module" in formats:
            return Source(str(_saved(model, scratch, progress)), identity, backend)
        assert backend is not None
        return Source(str(export_for(model, backend, device, progress).path), identity, backend)
    else:
        path = Path(model).expanduser()
        there = path.exists()
        place = path.resolve() if there else os.fspath(model)
        identity = _hash(path.resolve()) if there else ""
        if there and (formats is None or "module" in formats):
            return Source(str(place), identity, backend)
    progress("load the model", 0, 1)
    loaded = Model.from_pretrained(place, dtype=dtype, trust=trust)
    identity = identity or loaded.fingerprint()
    if formats is None or "module" in formats:
        return Source(str(place), identity, backend)
    assert backend is not None
    return Source(str(export_for(loaded, backend, device, progress).path), identity, backend)


def _saved(model: Model, scratch: Path, progress: Callable[[str, int, int], None]) -> Path:
    """Save a live model where workers find it."""
    progress("save the model for the workers", 0, 1)
    artifact = model.save_pretrained(scratch / "model", overwrite=True)
    stated: dict[str, Any] = artifact.manifest["formats"].get("safetensors", {})
    if stated.get("library") == "custom":
        raise UnsupportedError(
            f"a live {model.facts.architecture} cannot be handed to worker processes: its class is code. Export it, "
            "and every worker can open it: lmopt.batch(model, ..., backend='onnxruntime'), or give a folder."
        )
    return artifact.path


def _hash(path: Path) -> str:
    """Hash a model's file, or every file of its folder with its name."""
    if path.is_file():
        return file_hash(path)[0]
    names = sorted(one.name for one in path.iterdir() if one.is_file() and not one.name.startswith("."))
    digest = hashlib.sha256()
    for name, (content, _) in zip(
        names, in_parallel(lambda name: file_hash((path / name).resolve()), names), strict=True
    ):
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()
