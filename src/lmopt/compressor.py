"""Make a model smaller by a recipe, and measure what that costs."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from lmopt.compression.calibration import LEAST_TOKENS, Calibration, choose_rows
from lmopt.compression.step import Progress, Setting, Step, silent
from lmopt.contracts import EngineRequest
from lmopt.errors import InputError, ParityError, UnsupportedError, UnsupportedOptionError
from lmopt.evaluation.loss import CompressionReport, measure_loss
from lmopt.evaluation.tolerances import TOLERANCES, Tolerance
from lmopt.gate import GATE_TEXTS
from lmopt.generation import GenerationConfig, generate
from lmopt.model import Model
from lmopt.pairs import after, pairs
from lmopt.registry import backends
from lmopt.types import AnyArray, IntArray

# Rows that a model writes at once, where it writes its own calibration texts.
_WRITTEN_AT_ONCE: Final = 16
# Windows that texts are read in; KL settles within a few thousand tokens.
_WINDOW: Final = 512
_TORCH_ROOM: Final = "lmopt.backends.torch"


class LossWarning(UserWarning):
    """A recipe without a tolerance loses more than the table allows for its width."""


class Compressor:
    """Applies steps to models and measures the loss.

    Args:
        steps: Steps of `lmopt.compression`, or of plug-ins, in order.
        tolerance: Largest loss that is accepted. Where `None`, any loss is, but one beyond the table's
            row for the width (`lmopt.evaluation.tolerances`) is told as a `LossWarning`.

    Raises:
        UnsupportedOptionError: There is no step, or one of another kind.

    Example:
        >>> small = Compressor([GPTQ(bits=4, group_size=64)]).compress(model, calibration="book.txt")
        ... # doctest: +SKIP
        >>> print(small.report)  # doctest: +SKIP
    """

    def __init__(self, steps: Sequence[Step], *, tolerance: Tolerance | None = None) -> None:
        self.steps = tuple(steps)
        self.tolerance = tolerance
        strange = [repr(step) for step in self.steps if isinstance(step, type) or not isinstance(step, Step)]
        if not self.steps or strange:
            raise UnsupportedOptionError(
                f"a recipe is a list of steps of lmopt.compression, such as Quantize(bits=4); given: "
                f"{strange[0] if strange else 'an empty list'}"
            )

    def compress(
        self,
        model: Model,
        *,
        calibration: Calibration | Sequence[str] | str | os.PathLike[str] | None = None,
        texts: Sequence[str] | None = None,
        sources: Sequence[Any] | None = None,
        progress: Progress | None = None,
    ) -> Model:
        """Make a compressed copy of a model.

        Args:
            model: The model; it is left as it is.
            calibration: What the model reads while steps that need it work: texts, a text file's path, or
                a `Calibration` with sizes and seed. `Calibration(None)` lets the model write it. A model
                without a tokenizer reads seeded random ids where it is `None`. An encoder-decoder needs
                `Calibration(texts, sources=[...])`.
            texts: Texts to measure the loss on, some thousand tokens for figures that settle; not those of
                the calibration. Where `None`, lmopt's few built-in ones.
            sources: For an encoder-decoder, which is measured on pairs: what its encoder reads before each of `texts`
                (texts, ids or features). Without `texts`, the original's own greedy texts are what is right. Where
                `None`, built-in texts or made-up numbers.
            progress: Called with the stage's name, the steps done and their total.

        Returns:
            The compressed model, with `recipe` and `report`.

        Raises:
            ParityError: It loses more than `tolerance`; its `report` has the numbers.
            InputError: A weight is not finite, the texts hold too few tokens, or a step needs calibration
                and there is none.
            UnsupportedOptionError: The recipe does not fit the model.
        """
        tell = progress or silent
        if model.facts.source is not None:
            read, rows = self._pairs(model, calibration)
        elif sources is not None or (
            isinstance(calibration, Calibration) and calibration.sources is not None
        ):
            raise UnsupportedError(f"{model.source} has no encoder; leave sources out")
        else:
            read, rows = [], self._rows(model, calibration, tell)
        small, errors = model, {}
        for step in self.steps:
            tell(step.name, 0, 1)
            setting = Setting(small.facts.vocab_size, rows, tell, original=model, current=small, sources=read)
            apply = backends.load("torch", target=step.target)
            small = small.with_module(apply(small.module, step, setting), recipe=[step.to_dict()])
            errors.update(setting.errors)
        report = compare_models(
            model, small, texts=texts, sources=sources, layer_errors=errors, progress=tell
        )
        small.report = report
        limits = self.tolerance or TOLERANCES[_usual(self.steps)]
        if failures := report.failures(limits):
            told = f"{model.source} loses too much for the limits of {limits.name}: {'; '.join(failures)}. {report}"
            if report.layer_errors:
                told += ". Worst layers: " + ", ".join(f"{path} {e:.1%}" for path, e in report.worst_layers)
            if self.tolerance is not None:
                raise ParityError(told, report)
            warnings.warn(told, LossWarning, stacklevel=2)
        return small

    def _pairs(self, model: Model, given: Any) -> tuple[list[AnyArray], list[IntArray]]:
        """Make what encoder and decoder read, if a step needs it."""
        reading = [step for step in self.steps if step.needs_texts]
        unable = [step.name for step in reading if not getattr(step, "reads_sources", False)]
        if unable:
            raise UnsupportedError(
                f"step {unable[0]!r} does not take encoder-decoders, and {model.source} is one. Steps that do: GPTQ, "
                "AWQ, SmoothQuant, Mixed, Wanda, SparseGPT, PruneChannels, and without calibration Quantize (rtn), "
                "HQQ, Magnitude and Cast"
            )
        if not reading:
            if given is not None:
                raise UnsupportedError("no step of this recipe reads texts; leave calibration out")
            return [], []
        if not isinstance(given, Calibration) or given.sources is None:
            raise InputError(
                f"step {reading[0].name!r} must see {model.source} read: give compress(model, calibration=Calibration("
                "texts, sources=[...])) with what its encoder reads before each text (texts=None: it writes them "
                "itself), or lmopt compress --calibration FILE with lines as for --pairs"
            )
        read, rows = pairs(model, given.sources, given.texts)
        if (tokens := sum(map(len, rows))) < LEAST_TOKENS:
            raise InputError(
                f"after the calibration sources stand {tokens} tokens of text in all; at least {LEAST_TOKENS} are "
                "needed, and some thousand are better, or the weights are fitted to these few. Give more pairs"
            )
        return read, rows

    def _rows(self, model: Model, given: Any, tell: Progress) -> list[IntArray]:
        """Make the calibration rows, if a step needs any."""
        needing = [step.name for step in self.steps if step.needs_texts]
        taking = given is not None and any(getattr(step, "takes_texts", False) for step in self.steps)
        if not needing and not taking:
            return []
        if model.tokenizer is None:
            if given is not None and not (isinstance(given, Calibration) and given.texts is None):
                raise InputError(
                    "the model has no tokenizer, so calibration texts cannot be read; leave them out"
                )
            sizes = given or Calibration(None)
            width = min(sizes.row_tokens, model.facts.context_length or sizes.row_tokens)
            random = np.random.default_rng(sizes.seed)
            return list(random.integers(0, model.facts.vocab_size, (sizes.rows, width)))
        if given is None:
            raise InputError(
                f"step {needing[0]!r} must see the model read text: give compress(model, calibration=[texts]) or the "
                "path of a text file (lmopt compress --calibration FILE), some 64,000 tokens of the kind that the "
                "model will meet. Calibration(None) lets the model write them itself"
            )
        calibration = Calibration.of(given)
        if calibration.texts is None:
            return write_rows(model, calibration, tell)
        return calibration.cut(model.tokenizer, model.facts.context_length)


def write_rows(model: Model, calibration: Calibration, tell: Progress) -> list[IntArray]:
    """Let a model write its calibration texts: sampled at temperature 1, from its first token on.

    Args:
        model: The model.
        calibration: Sizes and seed.
        tell: Told of rows done.
    """
    width = min(calibration.row_tokens, model.facts.context_length or calibration.row_tokens)
    engine = backends.load("torch")(EngineRequest(facts=model.facts, module=model.module))
    start = (model.tokenizer.bos_token_id if model.tokenizer is not None else None) or 0
    rows: list[IntArray] = []
    try:
        while len(rows) < calibration.rows:
            count = min(_WRITTEN_AT_ONCE, calibration.rows - len(rows))
            configs = [
                GenerationConfig(
                    max_new_tokens=width - 1, do_sample=True, seed=calibration.seed + len(rows) + place
                )
                for place in range(count)
            ]
            found = generate(engine, [[start]] * count, configs)
            rows += [np.array([start, *one[0].token_ids], np.int64) for one in found]
            tell("write calibration texts", len(rows), calibration.rows)
    finally:
        engine.close()
    ids: IntArray = np.concatenate(rows)
    return choose_rows(ids, calibration.rows, width, calibration.seed)


def compare_models(
    original: Model,
    small: Model,
    *,
    texts: Sequence[str] | None = None,
    sources: Sequence[Any] | None = None,
    layer_errors: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> CompressionReport:
    """Hold a compressed model against its original, both in eager mode.

    Args:
        original: The float model.
        small: The compressed one.
        texts: As for `Compressor.compress`.
        sources: As for `Compressor.compress`.
        layer_errors: Errors of single weights, for the report.
        progress: As for `Compressor.compress`.

    Raises:
        InputError: The texts hold no token that could be predicted, or there is no tokenizer to read them.
    """
    forward = backends.load("torch", target=f"{_TORCH_ROOM}.reference:FullForward")
    size = backends.load("torch", target=f"{_TORCH_ROOM}.quantizing:stored_bytes")
    if original.facts.source is None:
        rows = _windows(original, texts)
        reference, candidate = (forward(one.module, lean=True).pieces for one in (original, small))
    else:
        read, rows = pairs(original, sources, texts)
        reference, candidate = (
            after(forward(one.module, lean=True, source=original.facts.source), read)
            for one in (original, small)
        )
    return measure_loss(
        reference,
        candidate,
        rows,
        bytes=size(small.module),
        float_bytes=size(original.module),
        texts="built-in" if texts is None and sources is None else "given",
        layer_errors=layer_errors,
        progress=progress,
    )


def _windows(model: Model, texts: Sequence[str] | None) -> list[IntArray]:
    """Cut texts into rows of token ids that fit the context."""
    width = min(_WINDOW, model.facts.context_length or _WINDOW)
    if model.tokenizer is None:
        if texts is not None:
            raise InputError("the model has no tokenizer, so texts cannot be read; leave them out")
        random = np.random.default_rng(0)
        return [random.integers(0, model.facts.vocab_size, min(width, 128)) for _ in range(4)]
    rows = [model.tokenizer.encode(text) for text in (GATE_TEXTS if texts is None else texts)]
    return [
        np.array(row[start : start + width], np.int64)
        for row in rows
        for start in range(0, len(row), width)
        if len(row) - start > 1
    ]


def _usual(steps: Sequence[Any]) -> str:
    """Name the row of the table by which the loss of a recipe without a tolerance is judged."""
    others = [step for step in steps if not hasattr(step, "dtype")]
    if not others:
        return str(steps[-1].dtype)
    return "int8" if min(float(getattr(step, "bits", 4)) for step in others) > 4 else "int4"
