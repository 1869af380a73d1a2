"""From whatever a user calls a model to an open engine."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from lmopt import __version__
from lmopt.artifact import Artifact, Staging, cached, is_artifact
from lmopt.contracts import Engine, EngineRequest
from lmopt.errors import ArtifactNotFoundError, UnsupportedError
from lmopt.exporter import Exporter
from lmopt.mappings import return_freed
from lmopt.model import Model
from lmopt.registry import backends, exporters
from lmopt.spec import BackendSpec
from lmopt.tokenizer import Tokenizer
from lmopt.types import ModelFacts

Progress = Callable[[str, int, int], None]

_AT_EXPORT: Final = frozenset({"kv_cache_dtype"})
"""Options of backends that are decided where the artefact is written, and asked of an exporter too."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An open engine and what goes with it."""

    engine: Engine
    backend: str
    facts: ModelFacts
    name: str
    tokenizer: Tokenizer | None = None
    generation_config: Mapping[str, Any] = field(default_factory=dict)


def open_source(
    source: str | os.PathLike[str] | Model | Artifact,
    *,
    backend: str | None,
    device: str,
    dtype: str,
    threads: int | None,
    trust: bool,
    options: Mapping[str, Any],
    progress: Progress | None = None,
) -> Opened:
    """Open an engine; arguments and errors as for `lmopt.Runtime`."""
    if not isinstance(source, Model | Artifact) and is_artifact(source):
        # Files are verified when the engine asks for them, so that formats it leaves alone cost nothing.
        source = Artifact.open(source, verify=False)
    name = backend or _default_backend(source)
    spec = backends.require(name)
    artifact: Artifact | None = None
    model: Model | None = None
    exporter = ""
    if isinstance(source, Artifact) and set(source.formats) & set(spec.can.formats):
        _require_support(spec, source.formats, device, dtype)
        artifact = source
        facts, label = source.facts, source.path.name
        defaults = _generation_config(source)
    else:
        live = "module" in spec.can.formats
        if not live:
            exporter = _exporter_for(spec)
        _require_support(spec, ("module" if live else exporters.spec(exporter).format,), device, dtype)
        model = _as_model(source, dtype, trust)
        facts, label = model.facts, model.source
        defaults = model.generation_config
    if facts.source is not None and "encoder" not in spec.can.features:
        able = [one.name for one in backends.status() if one.spec and "encoder" in one.spec.can.features]
        raise UnsupportedError(
            f"{label} is an encoder-decoder model, which backend {name!r} does not run; {', '.join(able)} do. "
            f"lmopt.Runtime(..., backend={able[0]!r})"
        )
    # Imports the engine, which takes seconds: not before the source is known to be there.
    factory = backends.load(name)
    if model is not None and exporter:
        chosen = {option: options[option] for option in _AT_EXPORT & options.keys()}
        artifact = export_for(model, name, device, progress, **chosen)
    if artifact is not None and trust and "trust" in spec.can.features:
        options = {**options, "trust": True}
    request = EngineRequest(
        facts=facts,
        artifact=artifact,
        module=model.module if model is not None and artifact is None else None,
        device=device,
        dtype=dtype,
        threads=threads,
        options=options,
    )
    if model is not None:
        return Opened(factory(request), name, facts, label, model.tokenizer, defaults)
    assert isinstance(source, Artifact)
    # A tokenizer of 50,000 entries takes as long to read as a session of 100 MB to create.
    with ThreadPoolExecutor(1, "lmopt-tokenizer") as pool:
        reading = pool.submit(_tokenizer, source)
        engine = factory(request)
    try:
        tokenizer = reading.result()
    except BaseException:
        engine.close()
        raise
    return_freed()
    return Opened(engine, name, facts, label, tokenizer, defaults)


def _default_backend(source: str | os.PathLike[str] | Model | Artifact) -> str:
    """Choose a backend that installing another package cannot change."""
    if isinstance(source, Artifact):
        for report in source.manifest["parity"].values():
            return str(report["backend"])
    return "torch"


def _require_support(spec: BackendSpec, formats: tuple[str, ...], device: str, dtype: str) -> None:
    support = spec.supports(formats=formats, device=device, dtype=dtype)
    if not support.ok:
        raise UnsupportedError(
            f"backend {spec.name!r} cannot do this: {'; '.join(support.reasons)}. "
            f"Installed backends: {', '.join(backends.names())} (see `lmopt backends`)."
        )


def _as_model(source: str | os.PathLike[str] | Model | Artifact, dtype: str, trust: bool) -> Model:
    if isinstance(source, Model):
        return source
    place = source.path if isinstance(source, Artifact) else source
    return Model.from_pretrained(place, dtype=dtype, trust=trust)


def _exporter_for(spec: BackendSpec) -> str:
    """Find an exporter that writes what the backend reads."""
    fits = [one.spec for one in exporters.status() if one.spec and one.spec.format in spec.can.formats]
    if fits:
        # One that is verified on this very backend first, then one that is called like its format, so
        # that installing another package changes nothing.
        return min(
            fits, key=lambda one: (one.verify_with != spec.name, one.name != one.format, one.name)
        ).name
    raise UnsupportedError(
        f"backend {spec.name!r} reads {', '.join(spec.can.formats)}, which no installed exporter writes "
        f"({', '.join(exporters.names())}). Give it an artefact in that format."
    )


def _dialect(spec: BackendSpec, exporter: str, device: str) -> str:
    """Choose the dialect that is made for the backend, which so far serves CPUs, or the common one."""
    targets = exporters.spec(exporter).targets
    return spec.name if spec.name in targets and device == "cpu" else targets[0]


def export_for(
    model: Model, backend: str, device: str, progress: Progress | None = None, **options: Any
) -> Artifact:
    """Export a model for a backend that reads artefacts, once, into lmopt's cache.

    Args:
        model: The model.
        backend: Name of the backend.
        device: Device that it will run on.
        progress: As for `lmopt.Exporter.export`.
        **options: Options of the exporter.
    """
    spec = backends.require(backend)
    exporter = _exporter_for(spec)
    return _export_into_cache(model, exporter, _dialect(spec, exporter, device), progress, options)


def _export_into_cache(
    model: Model, exporter: str, target: str, progress: Progress | None, options: Mapping[str, Any]
) -> Artifact:
    worker = Exporter(exporter, target=target, **options)
    fingerprint = model.fingerprint()
    key = {
        "exporter": exporter,
        "target": worker.target,
        "fingerprint": fingerprint,
        "facts": asdict(model.facts),
        "tokenizer": _digest(model.tokenizer),  # the folder has it too
        "lmopt": __version__,
        "versions": worker.versions(),
        **({"options": dict(options)} if options else {}),
    }

    def build(staging: Staging) -> None:
        worker.write(model, staging, fingerprint=fingerprint, progress=progress)

    return cached(key, build)


def _digest(tokenizer: Tokenizer | None) -> str | None:
    """SHA-256 of all that a tokenizer is saved as."""
    if tokenizer is None:
        return None
    found = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="lmopt-") as folder:
        tokenizer.save(folder)
        for file in sorted(one for one in Path(folder).rglob("*") if one.is_file()):
            found.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def _tokenizer(artifact: Artifact) -> Tokenizer | None:
    if "tokenizer.json" not in artifact.manifest["files"]:
        return None
    for name in artifact.manifest["files"]:
        if name.startswith(("tokenizer", "special_tokens", "chat_template")):
            artifact.file(name)
    return Tokenizer.from_folder(artifact.path)


def _generation_config(artifact: Artifact) -> dict[str, Any]:
    try:
        path: Path = artifact.file("generation_config.json")
    except ArtifactNotFoundError:
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
