"""What a compression costs: the compressed model held against the original, both in eager mode."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lmopt.errors import InputError
from lmopt.evaluation.divergence import DifferenceMeter, LogitsDifference
from lmopt.evaluation.perplexity import negative_log_likelihood
from lmopt.evaluation.tolerances import Tolerance
from lmopt.types import FloatArray, IntArray

_WORST: Final = 5
# Positions whose logits are held at once.
_PIECE: Final = 64

Pieces = Callable[[IntArray, int], Iterator[FloatArray]]
"""Reads `(sequence,)` ids at once and gives `(size, vocab_size)` logits, so many positions at a time."""


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """What a recipe cost, measured in eager mode against the model it was given.

    Attributes:
        difference: Distance of the logits: KL in nats, tie-aware top-1, and more.
        tokens: Tokens read.
        perplexity: Of the compressed model on the texts.
        float_perplexity: Of the original.
        log_ratio_stderr: Standard error of the logarithm of their ratio, from the token-wise differences.
        bytes: Bytes of the compressed weights.
        float_bytes: Bytes of the original's.
        texts: `"given"`, or `"built-in"` where no texts were given.
        layer_errors: Relative output error of each changed weight, `||(W - W') X|| / ||W X||`, by path.
    """

    difference: LogitsDifference
    tokens: int
    perplexity: float
    float_perplexity: float
    log_ratio_stderr: float
    bytes: int
    float_bytes: int
    texts: str
    layer_errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity over the original's."""
        return self.perplexity / self.float_perplexity

    @property
    def perplexity_ratio_stderr(self) -> float:
        """Standard error of `perplexity_ratio`."""
        return self.perplexity_ratio * self.log_ratio_stderr

    @property
    def worst_layers(self) -> tuple[tuple[str, float], ...]:
        """The weights with the largest errors, the worst first."""
        order = sorted(self.layer_errors.items(), key=lambda one: -one[1])
        return tuple(order[:_WORST])

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
            f"{self.perplexity:.3f} (x {self.perplexity_ratio:.4f} +- {self.perplexity_ratio_stderr:.4f}); KL mean "
            f"{one.kl_mean:.4g}, median {one.kl_p50:.4g}, p99 {one.kl_p99:.4g}, max {one.kl_max:.4g}; "
            f"top-1 {one.top1:.2%}, on {self.tokens} tokens of {self.texts} texts"
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the numbers as plain data for a manifest."""
        return {
            **asdict(self),
            "difference": self.difference.to_dict(),
            "perplexity_ratio": self.perplexity_ratio,
            "perplexity_ratio_stderr": self.perplexity_ratio_stderr,
            "layer_errors": {path: float(f"{error:.4g}") for path, error in self.layer_errors.items()},
        }


def measure_loss(
    reference: Pieces,
    candidate: Pieces,
    rows: Sequence[IntArray],
    *,
    bytes: int,
    float_bytes: int,
    texts: str,
    layer_errors: Mapping[str, float] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> CompressionReport:
    """Hold a compressed model against its original.

    Args:
        reference: Logits of the original.
        candidate: Logits of the compressed one.
        rows: Texts as ids, each of two tokens or more.
        bytes: Bytes of the compressed weights.
        float_bytes: Bytes of the original's.
        texts: Where the rows come from, for the report.
        layer_errors: Errors of single weights, for the report.
        progress: Called with the stage's name, the steps done and their total.

    Raises:
        InputError: There are no rows.
    """
    if not rows:
        raise InputError("the texts hold no two tokens in a row; give some hundred words")
    meter = DifferenceMeter()
    losses: list[NDArray[np.float64]] = []
    for place, ids in enumerate(rows):
        if progress is not None:
            progress("measure", place, len(rows))
        start = 0
        for pair in zip(reference(ids, _PIECE), candidate(ids, _PIECE), strict=True):
            meter.update(*pair)
            # Behind the last position there is nothing that could be predicted.
            targets = ids[start + 1 : start + 1 + len(pair[0])]
            losses.append(
                np.stack([negative_log_likelihood(one[: len(targets)], targets) for one in pair])
                if len(targets)
                else np.empty((2, 0))
            )
            start += len(pair[0])
    before, after = np.concatenate(losses, axis=1)
    excess = after - before
    return CompressionReport(
        difference=meter.result(),
        tokens=sum(map(len, rows)),
        perplexity=float(np.exp(after.mean())),
        float_perplexity=float(np.exp(before.mean())),
        log_ratio_stderr=float(excess.std() / math.sqrt(len(excess))),
        bytes=bytes,
        float_bytes=float_bytes,
        texts=texts,
        layer_errors=dict(layer_errors or {}),
    )
