"""Scale the inputs of linears so that the columns that matter lose least when they are rounded.

Where `x / s` is what a producer before some linears can be made to give, `W * s` in the linears leaves the model
as it was, and moves rounding errors between columns.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from lmopt.compression.layout import QuantizedArray
from lmopt.compression.statistics import Statistics
from lmopt.types import FloatArray

# Rows of a weight that scales are tried on: errors of so many tell those of all.
_ROWS: Final = 256
# Scales further apart than this are more than a trained weight can take in float16.
_MOST: Final = 1e4

Round = Callable[[FloatArray, int], QuantizedArray]
"""Quantizes the `n`-th weight."""


def scaled(statistics: Statistics, scales: FloatArray) -> Statistics:
    """Give the statistics of `x / scales`.

    Args:
        statistics: Those of `x`.
        scales: `(K,)` float32, positive.
    """
    return Statistics(
        gram=statistics.gram / np.outer(scales, scales),
        mean_abs=statistics.mean_abs / scales,
        max_abs=statistics.max_abs / scales,
        tokens=statistics.tokens,
    )


def search_scales(
    weights: Sequence[FloatArray], statistics: Statistics, quantize: Round, *, n_grid: int
) -> FloatArray | None:
    """Find the scales with the least error of what the linears compute (AWQ, Lin 2023, arXiv:2306.00978, eq. 4, 5).

    `s = mean|x| ** alpha`, `alpha` from 0 to 1 in `n_grid` steps; the error is `||(Q(W s) / s - W) X||`, summed
    over the linears that read the same input, of up to 512 rows spread evenly over each.

    Args:
        weights: `(N, K)` float32 each.
        statistics: Of their common input.
        quantize: Rounds a scaled weight.
        n_grid: Number of values of `alpha` beside 0.

    Returns:
        `(K,)` float32, or `None` where no scales are better than none.
    """
    size = np.maximum(statistics.mean_abs.astype(np.float64), 1e-8 * float(statistics.mean_abs.max()) or 1e-8)
    steps = [max(1, len(weight) // _ROWS) for weight in weights]
    samples = [weight[::every] for weight, every in zip(weights, steps, strict=True)]
    best: FloatArray | None = None
    least = np.inf
    for step in range(n_grid + 1):
        scales = _normal(size ** (step / n_grid))
        loss = 0.0
        for number, weight in enumerate(samples):
            error = quantize(weight * scales, number).values() / scales - weight
            loss += float(np.vdot(error @ statistics.gram, error)) * len(weights[number]) / len(weight)
        if loss < least:
            least, best = loss, scales if step else None
    return best


def smoothing_scales(weights: Sequence[FloatArray], statistics: Statistics, alpha: float) -> FloatArray:
    """Share outliers between activations and weights (SmoothQuant, Xiao 2022, arXiv:2211.10438, eq. 4).

    Args:
        weights: `(N, K)` float32 each.
        statistics: Of their common input.
        alpha: How much of the difficulty goes to the weights, 0 to 1.

    Returns:
        `(K,)` float32, `max|x| ** alpha / max|w| ** (1 - alpha)`.
    """
    largest = np.maximum.reduce([np.abs(weight).max(0) for weight in weights]).astype(np.float64)
    read = statistics.max_abs.astype(np.float64)
    alive = (largest > 0) & (read > 0)
    scales = np.ones_like(read)
    scales[alive] = read[alive] ** alpha / largest[alive] ** (1 - alpha)
    return _normal(scales)


def _normal(scales: "np.typing.NDArray[np.float64]") -> FloatArray:
    """Put scales around 1, which keeps both sides within their range."""
    scales = scales / np.sqrt(scales.max() * scales.min())
    result: FloatArray = np.clip(scales, 1 / _MOST, _MOST).astype(np.float32)
    return result
