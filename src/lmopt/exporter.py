"""Write a model in an engine's format, prove that it is still the same model, then publish it."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmopt.artifact import Artifact, Staging, publish
from lmopt.contracts import ExportRequest
from lmopt.errors import UnsupportedOptionError
from lmopt.evaluation import ParityReport, Tolerance
from lmopt.gate import check_dtype, gate_rows, verify
from lmopt.model import Model
from lmopt.model_card import model_card
from lmopt.registry import backends, exporters
from lmopt.speech import write_preprocessor

Progress = Callable[[str, int, int], None]

_VERSIONS_OF: Final = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "safetensors")


class Exporter:
    """Writes models in one format, or in several into one folder.

    Args:
        *formats: Names of exporters: `"onnx"`, `"torch.export"`, `"safetensors"`, or a plug-in's;
            `"onnx"` where none is given. With `Exporter("onnx", "safetensors")` one folder runs on
            ONNX Runtime and on torch, and transformers can load it.
        target: Dialect of the first format; its default one where `None`. `"onnx"` has `"portable"`
            and `"onnxruntime"`: ONNX Runtime's own operators, faster there. A model that cannot be
            said in them is written as `"portable"`; the artefact's
            `manifest["formats"]["onnx"]` has the `target` really written, and the reason
            (`fallback`).
        tolerance: Limits of the parity gate; `None` takes those of the model's dtype from the one
            table in `lmopt.evaluation.tolerances`.
        **options: Options of the first exporter, such as `opset=21` for `"onnx"`.

    Raises:
        UnknownPluginError: No exporter has this name.
        NotInstalledError: It needs a module that is missing; the message has the pip line.
        UnsupportedOptionError: The exporter has no such target, or a format is given twice.

    Example:
        >>> artifact = Exporter("onnx").export(model, "out/")  # doctest: +SKIP
    """

    def __init__(
        self,
        *formats: str,
        target: str | None = None,
        tolerance: Tolerance | None = None,
        **options: Any,
    ) -> None:
        names = formats or ("onnx",)
        if len(set(names)) < len(names):
            raise UnsupportedOptionError(f"formats are {', '.join(names)}; each can be given once")
        self._specs = [exporters.spec(name) for name in names]
        self._functions = [exporters.load(name) for name in names]
        first = self._specs[0]
        self.target = target or first.targets[0]
        if self.target not in first.targets:
            raise UnsupportedOptionError(
                f"exporter {first.name!r} has no target {target!r}; it has {', '.join(first.targets)}"
            )
        self._tolerance = tolerance
        self._options = options

    def export(
        self,
        model: Model,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> Artifact:
        """Export a model, run the parity gate, and publish the folder in one step.

        Args:
            model: The model; it is left as it is.
            folder: Folder to create.
            overwrite: Replace an artefact that is there.
            progress: Called with the stage's name, the steps done and their total.

        Returns:
            The published artefact.

        Raises:
            ExportError: The model cannot be written in this format.
            ParityError: The result does not compute what the model computes. The message has the
                numbers and, where it can be found, the first operator that differs. Nothing is at
                `folder` that was not there before.
            UnsupportedError: The engine that would verify it cannot compute in the model's dtype.
            ArtifactExistsError: Something is there that must not be replaced.
            DiskFullError: The disk cannot hold it.
        """
        size = weight_bytes(model)
        with publish(folder, overwrite=overwrite, needed=size * len(self._specs)) as staging:
            self.write(model, staging, progress=progress)
        return Artifact.open(folder, verify=False)

    def write(
        self,
        model: Model,
        staging: Staging,
        *,
        fingerprint: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Do the work of `export` in a staging folder that the caller publishes.

        Args:
            model: The model.
            staging: From `lmopt.artifact.publish` or `cached`.
            fingerprint: The model's, if the caller has just computed it.
            progress: As for `export`.

        Raises:
            ExportError, ParityError, UnsupportedError: As for `export`.
        """
        tell = progress or _silent
        with _evaluating(model):
            self._write(model, staging, fingerprint or model.fingerprint(), tell)

    def _write(self, model: Model, staging: Staging, fingerprint: str, tell: Progress) -> None:
        for place, spec in enumerate(self._specs):
            check_dtype(model, spec, spec.targets[0] if place else self.target)
        staging.manifest["model"] = asdict(model.facts)
        staging.manifest["source"] = {"name": model.source, "fingerprint": fingerprint}
        staging.manifest["versions"] = self.versions()
        reports: dict[str, ParityReport | None] = {}
        for place, (spec, function) in enumerate(zip(self._specs, self._functions, strict=True)):
            tell(f"export {spec.name}", 0, 1)
            request = ExportRequest(
                module=model.module,
                folder=staging.path,
                facts=model.facts,
                target=self.target if place == 0 else spec.targets[0],
                options=self._options if place == 0 else {},
                config=model.config,
                rows=[np.array(ids, np.int64) for ids in gate_rows(model) or ()],
            )
            staging.manifest["formats"][spec.format] = dict(function(request))
            tell(f"export {spec.name}", 1, 1)
        _write_companions(model, staging.path)
        for spec in self._specs:
            report = verify(
                model,
                spec,
                staging.path,
                staging.manifest,
                tolerance=self._tolerance,
                progress=lambda done, total, name=spec.name: tell(f"verify {name}", done, total),  # type: ignore[misc]
            )
            reports[spec.format] = report
            if report is not None:
                staging.manifest["parity"][spec.format] = {"backend": spec.verify_with, **report.to_dict()}
        card = model_card(model, staging.manifest["formats"], reports)
        (staging.path / "README.md").write_text(card, encoding="utf-8")

    def versions(self) -> dict[str, str]:
        """Versions of what the result depends on, for the manifest and the cache's key."""
        found = {}
        for name in _VERSIONS_OF:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Switch dropout and the like off, and leave every part as it was."""
    modes = [(part, part.training) for part in model.module.modules()]
    model.module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def weight_bytes(model: Model) -> int:
    """Count the bytes that a model's weights take in a file, quantized ones as they are stored."""
    return int(backends.load("torch", target="lmopt.backends.torch.quantizing:stored_bytes")(model.module))


def _write_companions(model: Model, folder: Path) -> None:
    """Write the files by which other tools know the model, as far as the exporter has not."""
    if model.config and not (folder / "config.json").exists():
        _write_json(folder / "config.json", model.config)
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", model.generation_config)
    if model.tokenizer is not None and not (folder / "tokenizer.json").exists():
        model.tokenizer.save(folder)
    write_preprocessor(folder, model.config, model.facts.source)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""
