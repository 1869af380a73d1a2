"""How much a linear's output owes to pieces of its input, and how what is kept makes up for what goes.

A *piece* is what structured pruning removes whole: a channel of an MLP is one input of its last linear, a
group of attention heads is a stretch of inputs of the output projection. What feeds them is cut alike.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmopt.compression.statistics import Statistics
from lmopt.errors import InputError, UnsupportedOptionError
from lmopt.types import FloatArray, IntArray


def importance(
    score: str,
    weight: FloatArray,
    pieces: IntArray,
    producers: Sequence[tuple[FloatArray, IntArray]],
    statistics: Statistics | None,
    name: str,
) -> FloatArray:
    """Score the pieces of one linear's input.

    Args:
        score: `"activation"` or `"weight"`: see the two functions below.
        weight: `(out, in)` float32, of the linear that reads the pieces.
        pieces: `(in,)` int64, the piece that each input belongs to: `0 .. count - 1`.
        producers: Of each linear that makes the inputs: `(out,)` float32 norms of its rows, and `(out,)`
            int64, the piece that each row belongs to.
        statistics: What the linear has read, where `score` is `"activation"`.
        name: Name of the linear, for messages.

    Returns:
        `(count,)` float32.

    Raises:
        InputError: A weight is NaN or infinite, or there are no statistics.
    """
    if score == "weight":
        scores = weight_importance(weight, pieces, producers)
    elif statistics is None:
        raise InputError(f"{name} has read no calibration text; give some, or score='weight' and refit=False")
    else:
        scores = activation_importance(weight, pieces, statistics)
    if not np.isfinite(scores).all() or not all(np.isfinite(norms).all() for norms, _ in producers):
        raise InputError(
            f"{name}, or what feeds it, holds NaN or infinity, so nothing can be ranked: the model is damaged already"
        )
    return scores


def activation_importance(weight: FloatArray, pieces: IntArray, statistics: Statistics) -> FloatArray:
    """Score pieces by the output that they carry: `sqrt(sum_j mean(x_j^2) ||W_:j||^2)` over a piece's inputs.

    For a channel this is Wanda's `|W_ij| ||X_j||` (Sun et al. 2023, arXiv:2306.11695) taken over the whole
    column, as FLAP does (An et al. 2024, arXiv:2312.11983).

    Args:
        weight: As for `importance`.
        pieces: As for `importance`.
        statistics: What the linear has read.

    Returns:
        `(count,)` float32.
    """
    energy = np.diag(statistics.gram) * np.square(weight, dtype=np.float32).sum(0)
    return _roots(np.bincount(pieces, np.maximum(energy, 0)))


def weight_importance(
    weight: FloatArray, pieces: IntArray, producers: Sequence[tuple[FloatArray, IntArray]]
) -> FloatArray:
    """Score pieces by their weights alone: the product of the norms of all that belongs to a piece.

    Args:
        weight: As for `importance`.
        pieces: As for `importance`.
        producers: As for `importance`.

    Returns:
        `(count,)` float32, each factor relative to its mean.
    """
    scores = _relative(_roots(np.bincount(pieces, np.square(weight, dtype=np.float32).sum(0))))
    for norms, owners in producers:
        scores = scores * _relative(_roots(np.bincount(owners, np.square(norms))))
    return scores


def refit(weight: FloatArray, gram: FloatArray, kept: IntArray, damping: float) -> FloatArray:
    """Let the inputs that stay compute, in least squares, what the removed ones did.

    `W' = W_k + W_d G_dk (G_kk + damping diag(G_kk))^-1`: the ridge regression of the removed part of the output
    on the inputs that stay (He et al. 2017, Channel Pruning, arXiv:1707.06168, for whole language models with
    one solve and no search). The ridge is relative to each input's own energy, since few inputs of a language
    model have most of it. Where removed inputs were always zero, nothing changes.

    Args:
        weight: `(out, in)` float32.
        gram: `(in, in)` float32, mean of `x x^T`.
        kept: `(kept,)` int64, inputs that stay, in order.
        damping: Ridge as a share of each input's energy; more keeps the weights nearer to what they were.

    Returns:
        `(out, kept)` float32.
    """
    removed = np.setdiff1d(np.arange(weight.shape[1]), kept)
    system = gram[np.ix_(kept, kept)].astype(np.float64)
    # Inputs that were always zero must not make it singular.
    floor = 1e-9 * float(np.mean(np.diag(gram))) + float(np.finfo(np.float32).tiny)
    system[np.diag_indices_from(system)] += damping * np.diag(system) + floor
    carried = np.linalg.solve(system, gram[np.ix_(kept, removed)].astype(np.float64))
    made: FloatArray = (weight[:, kept] + weight[:, removed] @ carried.T).astype(np.float32)
    return made


def check_share(share: Any) -> None:
    """Refuse a share of which nothing would go, or nothing stay.

    Raises:
        UnsupportedOptionError: It is no number between 0 and 1.
    """
    if isinstance(share, bool) or not isinstance(share, float | int) or not 0 < share < 1:
        raise UnsupportedOptionError(f"share is {share!r}; expected a number between 0 and 1, such as 0.25")


def check_scoring(score: Any, damping: Any) -> None:
    """Check the fields that all steps that cut pieces have.

    Raises:
        UnsupportedOptionError: A value is impossible.
    """
    if score not in ("activation", "weight"):
        raise UnsupportedOptionError(f"score is {score!r}; expected 'activation' or 'weight'")
    if isinstance(damping, bool) or not isinstance(damping, float | int) or not 0 <= damping < np.inf:
        raise UnsupportedOptionError(f"damping is {damping!r}; expected a number of at least 0")


def highest(scores: FloatArray, kept: int) -> IntArray:
    """Choose the `kept` highest scores; of equal ones the first. Returns their places in order."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    found: IntArray = np.sort(order[:kept]).astype(np.int64)
    return found


def _roots(values: NDArray[Any]) -> FloatArray:
    roots: FloatArray = np.sqrt(values).astype(np.float32)
    return roots


def _relative(values: FloatArray) -> FloatArray:
    """Divide by the mean, so that a product of many norms stays in range."""
    mean = float(values.mean())
    return values / np.float32(mean) if mean > 0 else values
