"""Open what was just written in the engine it is for, and hold it against the original."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmopt.contracts import Engine, EngineFactory, EngineRequest
from lmopt.errors import LmoptError, ParityError, UnsupportedError
from lmopt.evaluation import Examination, ParityReport, Tolerance, locate, require
from lmopt.evaluation.cases import make_source
from lmopt.model import Model
from lmopt.registry import backends
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


@dataclass(frozen=True, slots=True)
class _StagedView:
    """A staging folder as an engine sees it: the files have just been written by this process."""

    path: Path
    manifest: Mapping[str, Any]

    def file(self, name: str) -> Path:
        return self.path / name


def model_dtype(model: Model) -> str:
    """Name the type of a model's weights."""
    return str(backends.load("torch", target="lmopt.backends.torch.language_model:dtype_name")(model.module))


def widens(model: Model, spec: ExporterSpec, target: str) -> bool:
    """Say whether the gate compares model and export in float32, as the verifying engine lacks the model's type.

    Their weights are then the same and their rounding is not looked at: that is the engine's that will run the
    export. It is no way for the verifying engine's own dialect, which nobody else would run.
    """
    return model_dtype(model) in spec.verify_widened and target != spec.verify_with


def check_dtype(model: Model, spec: ExporterSpec, target: str) -> None:
    """Refuse what the verifying engine cannot compute before an hour is spent on it.

    Args:
        model: The original.
        spec: Exporter.
        target: Dialect that is to be written.

    Raises:
        UnsupportedError: The engine does not compute in the model's dtype.
    """
    if not spec.verify_with:
        return
    dtype, can = model_dtype(model), backends.spec(spec.verify_with).can.dtypes
    if dtype not in can and not widens(model, spec, target):
        raise UnsupportedError(
            f"the model is in {dtype}; {spec.verify_with} computes in {', '.join(can)}. Load it in one of "
            f"these: lmopt.Model.from_pretrained({model.source!r}, dtype={can[0]!r})"
        )


def verify(
    model: Model,
    spec: ExporterSpec,
    folder: Path,
    manifest: Mapping[str, Any],
    *,
    tolerance: Tolerance | None,
    progress: Callable[[int, int], None],
) -> ParityReport | None:
    """Run the parity gate on a staged export.

    Args:
        model: The original.
        spec: Exporter that wrote the folder.
        folder: Staging folder.
        manifest: Its manifest so far; the format's entry must be there.
        tolerance: Limits, or `None` for those of the model's dtype, or of rounded activations where the
            format was written so.
        progress: Called with cases done and their total.

    Returns:
        The report, or `None` where the exporter itself compares bit by bit.

    Raises:
        ParityError: With the numbers and, where it can be found, the first operator that differs.
    """
    if not spec.verify_with:
        return None
    # A program that this very process has just written is trusted.
    trusted = "trust" in backends.spec(spec.verify_with).can.features
    written = manifest["formats"][spec.format]
    wide = widens(model, spec, written.get("target", ""))
    module = model.module
    if wide:
        module = backends.load("torch", target="lmopt.backends.torch.casting:in_float32")(module)
    request = EngineRequest(
        facts=model.facts,
        artifact=_StagedView(folder, manifest),
        options={"trust": True} if trusted else {"widen": True} if wide else {},
    )
    reference = backends.load("torch", target="lmopt.backends.torch.reference:FullForward")(
        module, source=model.facts.source
    )
    prompts, source = gate_rows(model), model.facts.source
    texts = prompts if source is not None and source.kind == "ids" else None

    def tell(done: int, total: int) -> None:
        # What the last case had in memory would otherwise stay with the allocator.
        reference.give_back()
        progress(done, total)

    # Original and candidate take turns in memory: a large model would not fit in twice.
    reference.give_back()
    examination = Examination(
        reference,
        facts=model.facts,
        # Also where both sides compute in float32: the graph has constants, such as a square root, in bfloat16.
        dtype=_limits(model_dtype(model), written),
        prompts=prompts,
        tolerance=tolerance,
        rounding=reference.rounding,
        progress=tell,
        sources=[np.array(ids[: source.length], np.int64) for ids in texts] if source and texts else None,
        encoded=reference.encoded if source is not None else None,
    )
    reference.give_back()
    open_engine: EngineFactory = backends.load(spec.verify_with)
    with contextlib.closing(open_engine(request)) as candidate:
        examination.run(candidate)
    reference.give_back()
    report = examination.report()
    try:
        require(report, what=f"the {spec.name} export of {model.source} (nothing was published)")
    except ParityError as error:
        with contextlib.closing(open_engine(request)) as candidate:
            place = _where(model, module, candidate, prompts, texts)
        raise ParityError(f"{error}\n{place}", error.report) from None
    return report


def gate_rows(model: Model) -> list[list[int]] | None:
    """Give the gate's texts as the model's ids, `None` without a tokenizer."""
    if model.tokenizer is None:
        return None
    return [ids for text in GATE_TEXTS if (ids := model.tokenizer.encode(text))]


def _limits(dtype: str, written: Mapping[str, Any]) -> str:
    """Name the row of the tolerance table that a written format must keep."""
    # The user has asked by name, of the exporter or in the recipe, for activations rounded to 8 bits.
    if written.get("products") == "fp8":
        return "fp8-products"
    rounds = written.get("accuracy_level") == 4 or "activations" in written or "products" in written
    if rounds:
        return "int8-activations"
    return "int8-cache" if written.get("kv_cache_dtype") == "int8" else dtype


def _where(
    model: Model,
    module: Any,
    candidate: Engine,
    prompts: list[list[int]] | None,
    texts: list[list[int]] | None,
) -> str:
    """Say which operator differs first, if that can be found."""
    vocab_size = model.facts.vocab_size
    ids: IntArray = np.arange(3, 27) % vocab_size if prompts is None else np.array(prompts[0][:24])
    facts, source = model.facts.source, None
    if facts is not None:
        source = np.array(texts[0][: facts.length], np.int64) if texts else make_source(facts, 0, 0)
    try:
        engine = backends.load("torch")(EngineRequest(facts=model.facts, module=module))
        return str(locate(engine, candidate, ids, source=source, dtype=model_dtype(model)))
    except LmoptError as error:
        return f"The place could not be found: {error}"
