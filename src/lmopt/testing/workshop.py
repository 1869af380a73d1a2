"""Build the kit's tiny models in every format that a backend reads, each once, in a temporary folder."""

import contextlib
import functools
import json
import tempfile
import threading
import unittest
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from filelock import FileLock

from lmopt.accelerators import cuda
from lmopt.artifact import Artifact, is_artifact, publish
from lmopt.contracts import Engine, ExportRequest
from lmopt.errors import PluginError, UnsupportedError, UnsupportedPrecisionError
from lmopt.registry import exporters
from lmopt.testing import models, seq2seq
from lmopt.testing.case import (
    SOURCE_LENGTH,
    SOURCE_SEED,
    Case,
    Reference,
    Subject,
    close_shared,
    draw_source,
)
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts, SourceFacts

if TYPE_CHECKING:
    from torch import nn

LIVE: Final = "module"
"""The format of a live `torch.nn.Module`, which needs no exporter."""

MODELS: Final[dict[str, Callable[[], Any]]] = {
    "llama": models.tiny_llama,
    "gpt": models.tiny_gpt,
    "lstm": models.tiny_lstm,
}
"""Name to builder of the models that the kit runs."""

ENCODER_MODELS: Final[dict[str, tuple[Callable[[], Any], SourceFacts]]] = {
    "t5": (seq2seq.tiny_t5, seq2seq.T5_SOURCE),
    "whisper": (seq2seq.tiny_whisper, seq2seq.WHISPER_SOURCE),
}
"""The same for backends that declare the feature `"encoder"`, with what the encoders read."""


def exporter_for(model_format: str) -> str:
    """Name of an installed exporter that writes a format, `""` where there is none."""
    for name in exporters.names():
        try:
            spec = exporters.spec(name)
        except PluginError:
            continue
        if spec.format == model_format and all(need.is_met() for need in spec.requires):
            return name
    return ""


def missing_device(device: str, *, live: bool) -> str:
    """Say why a device cannot be used on this machine, `""` where it can as far as is known.

    Args:
        device: Device.
        live: Whether the backend takes live modules, which is to say that torch must be able to use it, too.
    """
    if device.partition(":")[0] != "cuda":
        return ""
    if problem := cuda().problem:
        return problem
    models.require_torch()
    import torch

    if live and not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the CUDA device of this machine"
    return ""


class Workshop:
    """Makes cases on demand; what it builds is kept until it is closed, and nowhere after.

    The parity gate of `lmopt.Exporter` is not run: judging what the engine makes of the files is
    this kit's own work, and must not need a second engine.
    """

    def __init__(self) -> None:
        # The finaliser of a TemporaryDirectory also removes it when the process ends.
        self._folder = tempfile.TemporaryDirectory(prefix="lmopt-testing-")
        self._place = Path(self._folder.name)
        self._built: dict[tuple[str, str, str, str], Subject] = {}
        self._failed: dict[tuple[str, str, str, str], str] = {}
        self._engines: list[list[Engine]] = []
        self._lock = threading.Lock()
        # Engines go before the files that they read, also when the process ends.
        self._closing = weakref.finalize(self, _close, self._engines, self._folder)

    def __enter__(self) -> Self:
        """Give the workshop itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove everything that was built."""
        self.close()

    def close(self) -> None:
        """Remove everything that was built."""
        self._built.clear()
        self._closing()

    def share(self, folder: Path) -> None:
        """Write models from now on where workshops of other processes find them, and take what is there.

        Args:
            folder: Folder of the processes of one test session, which must run the same code; it is made where it is
                missing, and not removed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._place = folder

    def case(
        self, backend: str, model: str, model_format: str, device: str, dtype: str, target: str = ""
    ) -> Callable[[], Case]:
        """Give a function that builds a case when it is called; what it gives shares one engine.

        A dialect that is not the format's default is the backend's to refuse, and a type other than float32 is this
        machine's (`UnsupportedPrecisionError`): then the function raises `unittest.SkipTest`.
        """

        @functools.cache
        def refusal() -> str:
            try:
                Case(backend, self.subject(model, model_format, dtype, target), device, dtype).open().close()
            except UnsupportedPrecisionError as error:
                return f"this machine does not compute in {dtype}: {error}"
            except UnsupportedError as error:
                if not target:
                    raise
                return f"the backend does not read this dialect: {error}"
            return ""

        shared: list[Engine] = []
        known: dict[str, Any] = {}
        self._engines.append(shared)

        def make() -> Case:
            subject = self.subject(model, model_format, dtype, target)
            if (target or dtype != "float32") and (reason := refusal()):
                raise unittest.SkipTest(reason)
            return Case(backend, subject, device, dtype, shared=shared, known=known)

        return make

    def subject(self, model: str, model_format: str, dtype: str, target: str = "") -> Subject:
        """Build a model in a format, its weights in a compute type, unless that is done already.

        Args:
            model: One of `MODELS` or `ENCODER_MODELS`.
            model_format: Format.
            dtype: Compute type.
            target: Dialect; the exporter's default where empty.
        """
        with self._lock:
            key = (model, model_format, dtype, target)
            if key in self._failed:
                raise unittest.SkipTest(f"the model could not be built: {self._failed[key]}")
            if key not in self._built:
                try:
                    self._built[key] = self._build(*key)
                except Exception as error:
                    # The check that came first fails with the error itself; the others need not.
                    self._failed[key] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    raise
            return self._built[key]

    def _build(self, model: str, model_format: str, dtype: str, dialect: str) -> Subject:
        import torch

        build, source = (MODELS[model], None) if model in MODELS else ENCODER_MODELS[model]
        module = build().to(getattr(torch, dtype))
        # The truth is computed in float32 from the weights as the type rounds them, so that only
        # the engine's arithmetic is judged.
        reference = reference_of(build().to(getattr(torch, dtype)).float(), source)
        facts = ModelFacts(
            vocab_size=models.VOCAB_SIZE if source is None else seq2seq.VOCAB_SIZE,
            context_length=None if model in ("lstm", "t5") else models.CONTEXT_LENGTH,
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            architecture=type(module).__name__,
            source=source,
        )
        if model_format == LIVE:
            return Subject(model, model_format, facts, reference, module=module)
        target = self._place / f"{model}-{model_format}{dialect}-{dtype}"
        with FileLock(f"{target}.lock"):
            if is_artifact(target):
                artifact = Artifact.open(target)
            else:
                artifact = export(module, model_format, facts, target, dialect=dialect)
        return Subject(model, model_format, facts, reference, artifact=artifact)


@functools.cache
def kept() -> Workshop:
    """Give the workshop that tests of one process share, removed when the process ends."""
    return Workshop()


def _close(engines: list[list[Engine]], folder: tempfile.TemporaryDirectory[str]) -> None:
    for shared in engines:
        close_shared(shared)
    folder.cleanup()


def export(
    module: "nn.Module", model_format: str, facts: ModelFacts, target: Path, *, dialect: str = ""
) -> Artifact:
    """Write a module in a format as a verified artefact, without the parity gate.

    Args:
        module: Language model in evaluation mode.
        model_format: Format that an installed exporter writes.
        facts: Facts of the model, which the manifest records.
        target: Folder to create.
        dialect: One of the exporter's targets; its first where empty.

    Raises:
        unittest.SkipTest: The exporter declares that it does not write such a model, or not so.
    """
    name = exporter_for(model_format)
    describe = getattr(getattr(module, "config", None), "to_json_string", None)
    with publish(target) as staging:
        request = ExportRequest(
            module=module,
            folder=staging.path,
            facts=facts,
            target=dialect or exporters.spec(name).targets[0],
            config=json.loads(describe()) if describe else {},
        )
        try:
            record = exporters.load(name)(request)
        except UnsupportedError as error:
            raise unittest.SkipTest(f"exporter {name!r} does not write this model: {error}") from error
        if record.get("target", request.target) != request.target:
            raise unittest.SkipTest(
                f"exporter {name!r} falls back: {record.get('fallback', 'no reason given')}"
            )
        staging.manifest["formats"][model_format] = record
        staging.manifest["model"] = asdict(facts)
    return Artifact.open(target)


def reference_of(module: "nn.Module", source: SourceFacts | None = None) -> Reference:
    """Make the truth about a module: its own full forward pass over one row, without a cache.

    Args:
        module: The module.
        source: What the encoder of a transformers encoder-decoder reads.
    """
    import torch

    if source is not None:
        return _reference_after(module, ModelFacts(seq2seq.VOCAB_SIZE, source=source))

    @functools.lru_cache(maxsize=1024)
    def run(ids: tuple[int, ...]) -> FloatArray:
        with torch.no_grad(), _one_thread():
            result = module(torch.tensor([ids]))
        logits = result.logits if hasattr(result, "logits") else result[0]
        return np.asarray(logits[0].float().numpy())

    def reference(ids: IntArray) -> FloatArray:
        return run(tuple(ids.tolist())).copy()

    return reference


def _reference_after(module: Any, facts: ModelFacts) -> Reference:
    import torch

    usual = draw_source(facts, SOURCE_LENGTH, seed=SOURCE_SEED)

    def reference(ids: IntArray, source: AnyArray | None = None) -> FloatArray:
        inputs = torch.from_numpy(usual if source is None else source)[None]
        with torch.no_grad(), _one_thread():
            result = module(**{module.main_input_name: inputs}, decoder_input_ids=torch.from_numpy(ids)[None])
        return np.asarray(result.logits[0].float().numpy())

    return reference


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute without its pool of threads: on models this small, waiting for it is most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
