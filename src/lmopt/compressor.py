"""Make a model smaller by a recipe, and measure what that costs."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from lmopt.compression import Quantize
from lmopt.errors import InputError, ParityError, UnsupportedOptionError
from lmopt.evaluation.divergence import DifferenceMeter, LogitsDifference, log_softmax
from lmopt.evaluation.tolerances import TOLERANCES, Tolerance
from lmopt.gate import GATE_TEXTS
from lmopt.model import Model
from lmopt.registry import backends
from lmopt.types import IntArray

_TORCH_ROOM: Final = "lmopt.backends.torch"
# Windows that texts are read in; KL settles within a few thousand tokens.
_WINDOW: Final = 512


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """What a recipe cost, measured in eager mode against the model it was given.

    Attributes:
        difference: Distance of the logits: KL in nats, tie-aware top-1, and more.
        tokens: Tokens read.
        perplexity: Of the compressed model on the texts.
        float_perplexity: Of the original.
        bytes: Bytes of the compressed weights.
        float_bytes: Bytes of the original's.
        texts: `"given"`, or `"built-in"` where no texts were given.
    """

    difference: LogitsDifference
    tokens: int
    perplexity: float
    float_perplexity: float
    bytes: int
    float_bytes: int
    texts: str

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity over the original's."""
        return self.perplexity / self.float_perplexity

    def failures(self, limits: Tolerance) -> list[str]:
        """Say what exceeds limits; the measure of single logits has no meaning here."""
        found = []
        if not self.difference.kl_mean <= limits.kl_mean:
            found.append(f"mean KL {self.difference.kl_mean:.4g} > {limits.kl_mean:g}")
        if not self.difference.top1 >= limits.top1:
            found.append(f"top-1 {self.difference.top1:.4f} < {limits.top1:g}")
        if not self.perplexity_ratio <= limits.perplexity_ratio:
            found.append(f"perplexity ratio {self.perplexity_ratio:.4f} > {limits.perplexity_ratio:g}")
        if self.difference.nonfinite:
            found.append(f"{self.difference.nonfinite} positions are not finite")
        return found

    def __str__(self) -> str:
        """Give the figures in one line."""
        one = self.difference
        return (
            f"{self.float_bytes / 1e6:.1f} MB -> {self.bytes / 1e6:.1f} MB "
            f"({self.float_bytes / self.bytes:.2f}x smaller); perplexity {self.float_perplexity:.3f} -> "
            f"{self.perplexity:.3f} (x {self.perplexity_ratio:.4f}); KL mean {one.kl_mean:.4g}, p99 {one.kl_p99:.4g}; "
            f"top-1 {one.top1:.2%}, on {self.tokens} tokens of {self.texts} texts"
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the numbers as plain data for a manifest."""
        return {
            **asdict(self),
            "difference": self.difference.to_dict(),
            "perplexity_ratio": self.perplexity_ratio,
        }


class LossWarning(UserWarning):
    """A recipe without a tolerance loses more than the table allows for its width."""


class Compressor:
    """Applies steps to models and measures the loss.

    Args:
        steps: Steps of `lmopt.compression`, in order.
        tolerance: Largest loss that is accepted. Where `None`, any loss is, but one beyond the table's
            row for the width (`lmopt.evaluation.tolerances`) is told as a `LossWarning`.

    Raises:
        UnsupportedOptionError: There is no step, or one of another kind.

    Example:
        >>> small = Compressor([Quantize(bits=8, group_size=64)]).compress(model)  # doctest: +SKIP
        >>> print(small.report)  # doctest: +SKIP
    """

    def __init__(self, steps: Sequence[Quantize], *, tolerance: Tolerance | None = None) -> None:
        self.steps = tuple(steps)
        self.tolerance = tolerance
        strange = [type(step).__name__ for step in self.steps if not isinstance(step, Quantize)]
        if not self.steps or strange:
            raise UnsupportedOptionError(
                f"a recipe is a list of steps of lmopt.compression, such as Quantize(bits=4); given: "
                f"{strange[0] if strange else 'an empty list'}"
            )

    def compress(self, model: Model, *, texts: Sequence[str] | None = None) -> Model:
        """Make a compressed copy of a model.

        Args:
            model: The model; it is left as it is.
            texts: Texts to measure the loss on, some thousand tokens for figures that settle. Where
                `None`, lmopt's few built-in ones; for a model without a tokenizer, seeded random ids.

        Returns:
            The compressed model, with `recipe` and `report`.

        Raises:
            ParityError: It loses more than `tolerance`; its `report` has the numbers.
            InputError: A weight is not finite, or the texts hold too few tokens.
            UnsupportedOptionError: The recipe does not fit the model.
        """
        module = model.module
        quantize = backends.load("torch", target=f"{_TORCH_ROOM}.quantizing:quantize_module")
        for step in self.steps:
            module = quantize(module, step, model.facts.vocab_size)
        small = model.with_module(module, recipe=[step.to_dict() for step in self.steps])
        report = measure_loss(model, small, texts=texts)
        small.report = report
        limits = self.tolerance or TOLERANCES["int8" if min(step.bits for step in self.steps) > 4 else "int4"]
        if failures := report.failures(limits):
            told = f"{model.source} loses too much for the limits of {limits.name}: {'; '.join(failures)}. {report}"
            if self.tolerance is not None:
                raise ParityError(told, report)
            warnings.warn(told, LossWarning, stacklevel=2)
        return small


def measure_loss(original: Model, small: Model, *, texts: Sequence[str] | None = None) -> CompressionReport:
    """Hold a compressed model against its original, both in eager mode.

    Args:
        original: The float model.
        small: The compressed one.
        texts: As for `Compressor.compress`.

    Raises:
        InputError: The texts hold no token that could be predicted.
    """
    forward = backends.load("torch", target=f"{_TORCH_ROOM}.reference:FullForward")
    size = backends.load("torch", target=f"{_TORCH_ROOM}.quantizing:stored_bytes")
    theirs, ours = forward(original.module), forward(small.module)
    meter = DifferenceMeter()
    losses = np.zeros(2)
    predicted = tokens = 0
    for ids in _windows(original, texts):
        pair = theirs(ids), ours(ids)
        meter.update(*pair)
        for place, logits in enumerate(pair):
            chosen = log_softmax(logits[:-1])[np.arange(len(ids) - 1), ids[1:]]
            losses[place] -= chosen.sum()
        predicted += len(ids) - 1
        tokens += len(ids)
    if not predicted:
        raise InputError("the texts hold no two tokens in a row; give some hundred words")
    before, after = np.exp(losses / predicted)
    return CompressionReport(
        difference=meter.result(),
        tokens=tokens,
        perplexity=float(after),
        float_perplexity=float(before),
        bytes=size(small.module),
        float_bytes=size(original.module),
        texts="built-in" if texts is None else "given",
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
