"""How far the logits of two models lie apart."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lmopt.errors import ShapeError
from lmopt.evaluation.tolerances import TOLERANCES, Tolerance
from lmopt.types import FloatArray

# Values that are compared at once: a few float64 copies of them stay in the cache of a core, and a
# vocabulary of 150,000 needs no more memory than one of 100.
_CHUNK_VALUES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class LogitsDifference:
    """Numbers that say how a candidate's logits differ from a reference's.

    Attributes:
        positions: Positions (rows of logits) compared; positions with NaN or infinity count too,
            but enter no other figure than `nonfinite`.
        nonfinite: Positions at which either side holds NaN or infinity.
        max_abs: Largest `|candidate - reference|`.
        mean_abs: Mean of it over positions and vocabulary.
        max_ratio: Largest `|candidate - reference| / (atol + rtol * |reference| + slack)`; at most 1
            is within the limits. Slack is the measured uncertainty of the reference at a position
            where a logit is over the plain limit, and 0 elsewhere. 0 where the tolerance sets none.
        kl_mean: Mean over positions of KL(reference || candidate) in nats.
        kl_p50: Median of it.
        kl_p99: 99th percentile of it.
        kl_max: Largest of it.
        top1: Share of positions with the same most likely token, ties excused.
        top1_raw: The same, ties not excused.
        top1_misses: Positions whose most likely token differs and is no tie.
        cosine_min: Least cosine between the two vectors of logits of a position.
    """

    positions: int
    nonfinite: int
    max_abs: float
    mean_abs: float
    max_ratio: float
    kl_mean: float
    kl_p50: float
    kl_p99: float
    kl_max: float
    top1: float
    top1_raw: float
    top1_misses: int
    cosine_min: float

    def to_dict(self) -> dict[str, Any]:
        """Give the numbers for a manifest, floats rounded to six significant digits."""
        return {
            key: float(f"{value:.6g}") if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A position at which a logit is over the plain limit, kept until its slack is asked for."""

    slack: Callable[[], NDArray[np.float64]]
    position: int
    errors: NDArray[np.float64]
    limits: NDArray[np.float64]

    def ratio(self) -> float:
        return float((self.errors / (self.limits + self.slack()[self.position])).max())


class DifferenceMeter:
    """Gathers differences over many calls, in memory that grows by a few numbers a position.

    A disagreement about the most likely token is excused as a **tie** where the reference rates the
    candidate's choice within twice the smaller of (a) the largest error at that position and (b) the
    rounding that the type allows (`Tolerance.tie`). Without (b) the rule would excuse everything:
    an error of `e` can only swap logits less than `2 e` apart.

    Args:
        tolerance: Gives `atol`, `rtol` and `tie`.
    """

    def __init__(self, tolerance: Tolerance = TOLERANCES["float32"]) -> None:
        self.tolerance = tolerance
        self._values = 0
        self._abs_sum = 0.0
        self._max_abs = 0.0
        self._max_ratio = 0.0
        self._cosine_min = 1.0
        self._nonfinite = 0
        self._raw_misses = 0
        self._misses = 0
        self._kl: list[NDArray[np.float64]] = []
        self._doubts: list[_Doubt] = []

    def update(
        self,
        reference: FloatArray,
        candidate: FloatArray,
        slack: Callable[[], NDArray[np.float64]] | None = None,
    ) -> None:
        """Add positions.

        Args:
            reference: `(..., vocab)` logits.
            candidate: Logits of the same shape.
            slack: Gives `(positions,)` what may be added to the limit of each position's logits,
                where the reference itself is uncertain. Called by `result`, and only if a logit
                exceeds the plain limit: it may cost a pass of the reference, whose memory may not
                be there for as long as the candidate holds its own.

        Raises:
            ShapeError: The shapes differ, or there is no vocabulary axis.
        """
        if reference.shape != candidate.shape or reference.ndim == 0:
            raise ShapeError(
                f"the reference has logits of shape {reference.shape}, the candidate of {candidate.shape}; "
                "both must be (..., vocab) of the same shape."
            )
        for start, ref, cand in _chunks(reference, candidate):
            self._add(ref, cand, slack, start)

    def merge(self, other: "DifferenceMeter") -> None:
        """Add everything that another meter of the same tolerance has gathered."""
        self._values += other._values
        self._abs_sum += other._abs_sum
        self._max_abs = max(self._max_abs, other._max_abs)
        self._max_ratio = max(self._max_ratio, other._max_ratio)
        self._cosine_min = min(self._cosine_min, other._cosine_min)
        self._nonfinite += other._nonfinite
        self._raw_misses += other._raw_misses
        self._misses += other._misses
        self._kl.extend(other._kl)
        self._doubts.extend(other._doubts)

    def result(self) -> LogitsDifference:
        """Give the figures over all positions so far; ask for the slack of those in doubt."""
        kl = np.concatenate(self._kl) if self._kl else np.zeros(0)
        finite = kl.size
        some = kl if finite else np.zeros(1)
        positions = finite + self._nonfinite
        return LogitsDifference(
            positions=positions,
            nonfinite=self._nonfinite,
            max_abs=self._max_abs,
            mean_abs=self._abs_sum / max(1, self._values),
            max_ratio=max([self._max_ratio, *(doubt.ratio() for doubt in self._doubts)]),
            kl_mean=float(some.mean()),
            kl_p50=float(np.percentile(some, 50)),
            kl_p99=float(np.percentile(some, 99)),
            kl_max=float(some.max()),
            top1=1.0 - self._misses / max(1, finite),
            top1_raw=1.0 - self._raw_misses / max(1, finite),
            top1_misses=self._misses,
            cosine_min=self._cosine_min,
        )

    def _add(
        self,
        reference: FloatArray,
        candidate: FloatArray,
        slack: Callable[[], NDArray[np.float64]] | None,
        start: int,
    ) -> None:
        """Add a chunk of shape `(positions, vocab)` that is small enough to hold in float64."""
        ref, cand = reference.astype(np.float64), candidate.astype(np.float64)
        finite = np.asarray(np.isfinite(ref).all(axis=1) & np.isfinite(cand).all(axis=1))
        self._nonfinite += int((~finite).sum())
        ref, cand = ref[finite], cand[finite]
        if not ref.size:
            return
        rows = np.arange(len(ref))
        ref_top, cand_top = ref.argmax(axis=1), cand.argmax(axis=1)
        difference = ref - cand
        self._kl.append(_kl(ref, cand, difference))
        error = np.abs(difference, out=difference)
        error_max = error.max(axis=1)
        self._values += error.size
        self._abs_sum += float(error.sum())
        self._max_abs = max(self._max_abs, float(error_max.max()))

        best = ref[rows, ref_top]
        margin = best - ref[rows, cand_top]
        allowed = self.tolerance.tie * (1.0 + np.abs(best))
        tie = margin <= 2.0 * np.minimum(error_max, allowed)
        self._raw_misses += int((ref_top != cand_top).sum())
        self._misses += int(((ref_top != cand_top) & ~tie).sum())

        norms = np.sqrt(np.einsum("ij,ij->i", ref, ref) * np.einsum("ij,ij->i", cand, cand))
        dots = np.einsum("ij,ij->i", ref, cand)
        cosine = np.divide(dots, norms, out=np.ones_like(dots), where=norms > 0)
        self._cosine_min = min(self._cosine_min, float(cosine.min()))
        if self.tolerance.atol is not None:
            limit = np.abs(ref, out=ref)
            limit *= self.tolerance.rtol
            limit += self.tolerance.atol
            ratio = (error / limit).max(axis=1)
            sure = ratio <= 1.0 if slack is not None else np.ones(len(ratio), bool)
            self._max_ratio = max(self._max_ratio, float(ratio[sure].max(initial=0.0)))
            if slack is not None:
                positions = start + np.flatnonzero(finite)
                self._doubts += [
                    _Doubt(slack, int(positions[at]), *_outer(error[at], limit[at]))
                    for at in np.flatnonzero(~sure)
                ]


def compare_logits(
    reference: FloatArray, candidate: FloatArray, tolerance: Tolerance = TOLERANCES["float32"]
) -> LogitsDifference:
    """Compare two arrays of logits in one go.

    Args:
        reference: `(..., vocab)` logits.
        candidate: Logits of the same shape.
        tolerance: Limits for `max_ratio` and for ties.

    Raises:
        ShapeError: The shapes differ.
    """
    meter = DifferenceMeter(tolerance)
    meter.update(reference, candidate)
    return meter.result()


def log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    """Turn `(..., vocab)` logits into log-probabilities in float64, safe from overflow."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def _kl(
    ref: NDArray[np.float64], cand: NDArray[np.float64], difference: NDArray[np.float64]
) -> NDArray[np.float64]:
    """KL(ref || cand) a row: `sum p (ref - cand) + logsumexp(cand) - logsumexp(ref)`.

    Written so that the two large sums cancel once a row and not once a token: right to about 1e-14.
    """
    top_ref, top_cand = ref.max(axis=1), cand.max(axis=1)
    weights = np.exp(ref - top_ref[:, None])
    total = weights.sum(axis=1)
    mean_difference = np.einsum("ij,ij->i", weights, difference) / total
    other = np.exp(cand - top_cand[:, None]).sum(axis=1)
    kl = mean_difference - (top_ref - top_cand) + np.log(other) - np.log(total)
    # Rounding can leave -1e-16 where the two are equal.
    return np.asarray(np.maximum(kl, 0.0))


def _outer(
    errors: NDArray[np.float64], limits: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keep what can be the largest `error / (limit + slack)` for some slack.

    A value with a smaller error and a larger limit than another never is. Of a vocabulary a dozen remain.
    """
    order = np.argsort(limits)
    errors, limits = errors[order], limits[order]
    best = np.maximum.accumulate(errors)
    kept = np.concatenate([[True], errors[1:] > best[:-1]])
    return errors[kept], limits[kept]


def _chunks(reference: FloatArray, candidate: FloatArray) -> Iterator[tuple[int, FloatArray, FloatArray]]:
    vocab = reference.shape[-1]
    flat_ref, flat_cand = reference.reshape(-1, vocab), candidate.reshape(-1, vocab)
    step = max(1, _CHUNK_VALUES // max(1, vocab))
    for start in range(0, len(flat_ref), step):
        yield start, flat_ref[start : start + step], flat_cand[start : start + step]
