"""Write a model in an engine's format, prove that it is still the same model, then publish it."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmopt.artifact import Artifact, Staging, publish
from lmopt.contracts import Engine, EngineRequest, ExportRequest
from lmopt.errors import LmoptError, ParityError, UnsupportedError, UnsupportedOptionError
from lmopt.evaluation import ParityReport, Tolerance, locate, measure, require
from lmopt.model import Model
from lmopt.model_card import model_card
from lmopt.registry import backends, exporters
from lmopt.spec import ExporterSpec
from lmopt.types import IntArray

# Real text in several scripts, so that the gate meets tokens from all over the vocabulary.
GATE_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog, while 3,141 engineers debate whether the model that they "
    "exported yesterday still says what it said before. It must: nobody should have to check twice.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)  # fails on an empty list\n",
    "Los niños jugaban en el jardín; später kamen die Eltern hinzu, et tout le monde riait de bon cœur.",
    "机器学习模型应当在每个引擎上给出相同的结果。今日は良い天気ですね。Привет, как дела? مرحبا بالعالم 🙂",
)

_VERSIONS_OF: Final = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "safetensors")


@dataclass(frozen=True, slots=True)
class _StagedView:
    """A staging folder as an engine sees it: the files have just been written by this process."""

    path: Path
    manifest: Mapping[str, Any]

    def file(self, name: str) -> Path:
        return self.path / name


class Exporter:
    """Writes models in one format.

    Args:
        format: Name of an exporter: `"onnx"`, `"torch.export"`, `"safetensors"`, or a plug-in's.
        target: Dialect of the format; the exporter's first one where `None`.
        tolerance: Limits of the parity gate; `None` takes those of the model's dtype from the one
            table in `lmopt.evaluation.tolerances`.
        **options: Options of the exporter, such as `opset=21` for `"onnx"`.

    Raises:
        UnknownPluginError: No exporter has this name.
        NotInstalledError: It needs a module that is missing; the message has the pip line.
        UnsupportedOptionError: The exporter has no such target.

    Example:
        >>> artifact = Exporter("onnx").export(model, "out/")  # doctest: +SKIP
    """

    def __init__(
        self,
        format: str = "onnx",
        *,
        target: str | None = None,
        tolerance: Tolerance | None = None,
        **options: Any,
    ) -> None:
        self._spec: ExporterSpec = exporters.spec(format)
        self._export = exporters.load(format)
        self.target = target or self._spec.targets[0]
        if self.target not in self._spec.targets:
            raise UnsupportedOptionError(
                f"exporter {format!r} has no target {target!r}; it has {', '.join(self._spec.targets)}"
            )
        self._tolerance = tolerance
        self._options = options

    def export(
        self,
        model: Model,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
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
        needed = sum(one.numel() * one.element_size() for one in model.module.parameters())
        with publish(folder, overwrite=overwrite, needed=needed) as staging:
            self.write(model, staging, progress=progress)
        return Artifact.open(folder, verify=False)

    def write(
        self, model: Model, staging: Staging, *, progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        """Do the work of `export` in a staging folder that the caller publishes.

        Args:
            model: The model.
            staging: From `lmopt.artifact.publish` or `cached`.
            progress: As for `export`.

        Raises:
            ExportError, ParityError, UnsupportedError: As for `export`.
        """
        tell = progress or _silent
        self._check_dtype(model)
        tell("export", 0, 1)
        request = ExportRequest(
            module=model.module,
            folder=staging.path,
            facts=model.facts,
            target=self.target,
            options=self._options,
            config=model.config,
        )
        described = dict(self._export(request))
        tell("export", 1, 1)
        staging.manifest["formats"] = {self._spec.format: described}
        staging.manifest["model"] = asdict(model.facts)
        staging.manifest["source"] = {"name": model.source, "fingerprint": model.fingerprint()}
        staging.manifest["versions"] = self.versions()
        _write_companions(model, staging.path)
        report = self._verify(model, staging, tell)
        if report is not None:
            backend = self._spec.verify_with
            staging.manifest["parity"] = {"backend": backend, **report.to_dict()}
        (staging.path / "README.md").write_text(
            model_card(model, self._spec, self.target, report), encoding="utf-8"
        )

    def versions(self) -> dict[str, str]:
        """Versions of what the result depends on, for the manifest and the cache's key."""
        found = {}
        for name in _VERSIONS_OF:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found

    def _check_dtype(self, model: Model) -> None:
        """Refuse what the verifying engine cannot compute before an hour is spent on it."""
        if not self._spec.verify_with:
            return
        dtype = _dtype(model)
        can = backends.spec(self._spec.verify_with).can.dtypes
        if dtype not in can:
            raise UnsupportedError(
                f"the model is in {dtype}; {self._spec.verify_with} computes in {', '.join(can)}. Load it in one of "
                f"these: lmopt.Model.from_pretrained({model.source!r}, dtype={can[0]!r})"
            )

    def _verify(
        self, model: Model, staging: Staging, tell: Callable[[str, int, int], None]
    ) -> ParityReport | None:
        """Run the parity gate on what was written."""
        backend = self._spec.verify_with
        if not backend:
            return None
        view = _StagedView(staging.path, staging.manifest)
        # A program that this very process has just written is trusted.
        options = {"trust": True} if "trust" in backends.spec(backend).can.features else {}
        request = EngineRequest(facts=model.facts, artifact=view, options=options)
        candidate: Engine = backends.load(backend)(request)
        try:
            reference = backends.load("torch", target="lmopt.backends.torch.reference:full_forward")(
                model.module
            )
            prompts = None
            if model.tokenizer is not None:
                prompts = [ids for text in GATE_TEXTS if (ids := model.tokenizer.encode(text))]
            report = measure(
                reference,
                candidate,
                facts=model.facts,
                dtype=_dtype(model),
                prompts=prompts,
                tolerance=self._tolerance,
                rounding=reference.rounding,
                progress=lambda done, total: tell("verify", done, total),
            )
            what = f"the {self._spec.name} export of {model.source}"
            try:
                require(report, what=what, locate="lmopt compare MODEL ARTEFACT --bisect")
            except ParityError as error:
                raise ParityError(f"{error}\n{_where(model, candidate, prompts)}", error.report) from None
        finally:
            candidate.close()
        return report


def _where(model: Model, candidate: Engine, prompts: list[list[int]] | None) -> str:
    """Say which operator differs first, if that can be found."""
    ids: IntArray = (
        np.arange(3, 27) % model.facts.vocab_size if prompts is None else np.array(prompts[0][:24])
    )
    try:
        engine = backends.load("torch")(EngineRequest(facts=model.facts, module=model.module))
        return str(locate(engine, candidate, ids, dtype=_dtype(model)))
    except LmoptError as error:
        return f"The place could not be found: {error}"


def _write_companions(model: Model, folder: Path) -> None:
    """Write the files by which other tools know the model, as far as the exporter has not."""
    if model.config and not (folder / "config.json").exists():
        _write_json(folder / "config.json", model.config)
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", model.generation_config)
    if model.tokenizer is not None and not (folder / "tokenizer.json").exists():
        model.tokenizer.save(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _dtype(model: Model) -> str:
    return str(next(model.module.parameters()).dtype).removeprefix("torch.")


def _silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""
