"""From the scores of one row to a token: narrowing the choice, and drawing from what remains.

The choice is kept as (ids, scores) of the tokens that are still possible: after top-k that is fifty
entries, not a vocabulary. The rules are those of transformers' warpers, in their order.
"""

import math
from dataclasses import dataclass

import numpy as np

from lmopt.errors import EngineError, UnsupportedOptionError
from lmopt.generation.config import GenerationConfig
from lmopt.types import FloatArray, IntArray

_LANES = 64  # the k-th largest value is looked for in the maxima of so many values first
_BLOCK = 256  # entries that are summed in one go
_LIKELY = (3e-5, 1e-5, 1e-6)  # probability that a token needs to be looked at first, and then
_SORTED = 2048  # entries that are sorted in less time than it takes to fill the bins
_SUMS = (1e-20, 1e30)  # sums of exponentials that lost nothing to the range of float32
_BINS, _BINS_PER_UNIT = 1024, 32  # for finding a border: 32 nats in steps of 1/32, the rest in the last bin


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens that are still possible.

    Attributes:
        ids: `(n,)` int64, ascending; `None` means all of the vocabulary.
        scores: `(n,)` float32.
    """

    ids: IntArray | None
    scores: FloatArray

    def keep(self, kept: IntArray) -> "Choice":
        """Narrow to the entries at positions `kept`, which ascend."""
        return Choice(kept if self.ids is None else self.ids[kept], self.scores[kept])

    def probabilities(self, vocab_size: int) -> FloatArray:
        """`(vocab_size,)` float32 probabilities that `draw` draws with."""
        full = np.zeros(vocab_size, np.float32)
        weights = np.exp(self.scores - self.scores.max())
        full[slice(None) if self.ids is None else self.ids] = weights / weights.sum(dtype=np.float64)
        return full


def greedy(logits: FloatArray) -> list[int]:
    """Likeliest token of each row of `(rows, vocab_size)`; the lowest id among equals.

    Raises:
        EngineError: A row holds NaN. `argmax` returns the first one, so looking there is enough.
    """
    best: list[int] = logits.argmax(axis=-1).tolist()
    for row, token in zip(logits, best, strict=True):
        check_best(float(row[token]))
    return best


def check_best(best: float) -> None:
    """Refuse scores whose maximum shows that no token can be chosen.

    Raises:
        EngineError: It is NaN.
        UnsupportedOptionError: It is minus infinity: every token was banned.
    """
    if math.isnan(best):
        raise EngineError(
            "the engine returned NaN logits. Run `lmopt compare` against the torch backend to find the "
            "layer, or choose dtype='float32' if a 16-bit type overflowed."
        )
    if best == -math.inf:
        raise UnsupportedOptionError(
            "the options leave no token to choose from: every id is banned or has probability 0. "
            "Relax no_repeat_ngram_size, bad_words_ids, suppress_tokens or min_new_tokens."
        )


def narrow(scores: FloatArray, config: GenerationConfig, ids: IntArray | None = None) -> Choice:
    """Apply temperature, top-k, top-p, min-p and typical-p to the `(vocab_size,)` scores of a row.

    With `ids`, which ascend, to the scores of these tokens: all that top-k could keep.
    """
    if config.temperature != 1.0:
        scores = scores / np.float32(config.temperature)
    choice = Choice(ids, scores)
    if 0 < config.top_k < scores.size:
        choice = choice.keep(_not_below_kth(scores, config.top_k))
    if config.top_p < 1.0:
        choice = choice.keep(_nucleus(choice.scores, config.top_p))
    if config.min_p is not None:
        weights = np.exp(choice.scores - choice.scores.max())
        choice = choice.keep(np.flatnonzero(weights >= np.float32(config.min_p)))
    if config.typical_p < 1.0:
        choice = choice.keep(_typical(choice.scores, config.typical_p))
    return choice


def draw(choice: Choice, uniform: float) -> int:
    """Draw a token by the inverse of the cumulative distribution, in the order of the ids.

    Args:
        choice: What is possible; the scores need not be normalised.
        uniform: From [0, 1).
    """
    scores = choice.scores
    best = scores.max()
    if scores.size <= _BLOCK:
        index = _invert(_weights(scores, best).cumsum(dtype=np.float64), uniform)
    else:
        # Choose a block by its sum first: a running sum over a whole vocabulary takes half a millisecond.
        blocks = np.zeros((-(-scores.size // _BLOCK), _BLOCK), np.float32)
        _weights(scores, best, out=blocks.reshape(-1)[: scores.size])
        sums = blocks.sum(axis=1)
        running = sums.cumsum(dtype=np.float64)
        block = _invert(running, uniform)
        before = float(running[block - 1]) if block else 0.0
        rest = min(max(0.0, (uniform * float(running[-1]) - before) / float(sums[block])), 1.0)
        index = block * _BLOCK + _invert(blocks[block].cumsum(dtype=np.float64), rest)
    return index if choice.ids is None else int(choice.ids[index])


def log_normalizer(scores: FloatArray, out: FloatArray | None = None) -> float:
    """Log of the sum of exponentials of `(vocab_size,)` scores; `out` is memory to work in."""
    # Logits are seldom so large that they must come down first, which takes as long as all the rest.
    with np.errstate(over="ignore"):
        total = _total(np.exp(scores, out=out))
    if _SUMS[0] < total < _SUMS[1]:
        return math.log(total)
    best = scores.max()
    return float(best) + math.log(_total(_weights(scores, best, out)))


def log_probabilities(logits: FloatArray) -> FloatArray:
    """Log-softmax of each row of `(rows, vocab_size)` logits, a row at a time so that none depends on another."""
    found: FloatArray = np.empty_like(logits)
    for line, result in zip(logits, found, strict=True):
        # The result's own memory holds what is summed, and then the result.
        np.subtract(line, np.float32(log_normalizer(line, out=result)), out=result)
    return found


def largest(values: FloatArray, count: int) -> IntArray:
    """Positions of the `count` largest of `(n,)` values, best first, the lower position among equals."""
    count = min(count, values.size)
    candidates = _not_below_kth(values, count)
    order = np.argsort(-values[candidates], kind="stable")[:count]
    return candidates[order]


def largest_sums(
    scores: FloatArray, less: FloatArray, more: FloatArray, count: int
) -> tuple[IntArray, IntArray, FloatArray]:
    """Find the largest of `scores - less + more`, of which only a few are worked out.

    Rounding keeps an order, so what is not below the `count`-th largest of the maxima of groups, worked out the same
    way, is all that could count.

    Args:
        scores: `(rows, vocab_size)` float32.
        less: `(rows,)` float32, taken from each of a row first.
        more: `(rows,)` float32, added then.
        count: How many are wanted.

    Returns:
        Rows, columns and sums, each `(count,)` or as many as there are; the largest sum first, and the lower row and
        column among equals.

    Raises:
        EngineError: One of the sums is NaN.
        UnsupportedOptionError: All are minus infinity.
    """
    rows, vocab_size = scores.shape
    lanes = vocab_size // _LANES
    whole = lanes * _LANES
    groups = scores[:, :whole].reshape(rows, _LANES, lanes)
    sums = ((groups.max(axis=1) - less[:, None]) + more[:, None]).ravel()
    if count > sums.size // 4:
        row, column = np.divmod(np.arange(scores.size), vocab_size)
    else:
        border = np.partition(sums, sums.size - count)[sums.size - count]
        # Not "at least": NaN is above everything, and is found.
        group, lane = np.divmod(np.flatnonzero(~(sums < border)), lanes)
        row = group.repeat(_LANES)
        column = (np.arange(0, whole, lanes) + lane[:, None]).ravel()
        if whole < vocab_size:
            rest = np.arange(whole, vocab_size)
            row = np.concatenate([row, np.arange(rows).repeat(rest.size)])
            column = np.concatenate([column, np.tile(rest, rows)])
    values = (scores[row, column] - less[row]) + more[row]
    check_best(float(values.max()))
    count = min(count, values.size)
    kept = np.flatnonzero(values >= np.partition(values, values.size - count)[values.size - count])
    row, column, values = row[kept], column[kept], values[kept]
    # By the sum, and by the place among equals.
    order = np.lexsort((row * vocab_size + column, -values))[:count]
    return row[order], column[order], values[order]


def _weights(scores: FloatArray, best: np.float32, out: FloatArray | None = None) -> FloatArray:
    weights: FloatArray = np.subtract(scores, best, out=out)
    np.exp(weights, out=weights)
    return weights


def _total(weights: FloatArray) -> float:
    """Sum of `(n,)` weights in half the time of `sum`, by a running sum for each lane of the CPU's vectors."""
    return float(np.einsum("i->", weights))


def _not_below_kth(values: FloatArray, k: int) -> IntArray:
    """Positions of all values that are not below the `k`-th largest, ascending."""
    lanes = values.size // _LANES
    if k > lanes // 4:
        return np.flatnonzero(values >= np.partition(values, values.size - k)[values.size - k])
    # Without partitioning a whole vocabulary: the k-th largest of the maxima of disjoint groups is no
    # larger than the k-th largest value. (Minus infinity, where few values are finite, admits all.)
    maxima = values[: lanes * _LANES].reshape(_LANES, lanes).max(axis=0)
    candidates = np.flatnonzero(values >= np.partition(maxima, lanes - k)[lanes - k])
    found = values[candidates]
    kept: IntArray = candidates[found >= np.partition(found, found.size - k)[found.size - k]]
    return kept


def _invert(cumulative: FloatArray, uniform: float) -> int:
    """Position at which a running sum of weights passes the fraction `uniform` of their total.

    Args:
        cumulative: float64: a float32 running sum is off by more than rare tokens weigh.
        uniform: From [0, 1].
    """
    index = int(cumulative.searchsorted(uniform * cumulative[-1], side="right"))
    if index == cumulative.size:  # the product was rounded up to the total
        index = int(cumulative.searchsorted(cumulative[-1], side="left"))
    return index


def _nucleus(scores: FloatArray, top_p: float) -> IntArray:
    """Positions that top-p keeps: the likeliest tokens up to this probability, one at least."""
    best = scores.max()
    weights = _weights(scores, best)
    total = float(weights.sum(dtype=np.float64))
    needed = top_p * total
    if scores.size > _BLOCK * _LANES:
        # In a language model a few hundred or thousand tokens hold nearly everything: the rest goes unseen.
        for share in _LIKELY:
            likely = np.flatnonzero(weights >= np.float32(share * total))
            heavy = weights[likely]
            mass = float(heavy.sum(dtype=np.float64))
            if likely.size and mass >= needed:
                return likely[_nearest(best - scores[likely], heavy, needed)]
            if mass < needed / 2:
                break
    return _nearest(best - scores, weights, needed)


def _nearest(keys: FloatArray, weights: FloatArray, needed: float) -> IntArray:
    """As `_lightest`, for keys of which the weights are `exp(-key)`: a few are sorted at once."""
    if keys.size > _SORTED:
        return _lightest(keys, weights, needed)
    ordered = np.sort(keys)
    count = int(np.exp(-ordered).cumsum(dtype=np.float64).searchsorted(needed)) + 1
    if count >= keys.size:  # beyond it, where the sum was rounded down
        return np.arange(keys.size)
    border = ordered[count - 1]
    kept = np.flatnonzero(keys <= border)
    if kept.size > count:  # of equal keys at the border, those of the lowest positions
        kept = np.delete(kept, np.flatnonzero(keys[kept] == border)[count - kept.size :])
    return kept


def _typical(scores: FloatArray, mass: float) -> IntArray:
    """Positions that locally typical sampling keeps (arXiv:2202.00666)."""
    logs = scores - np.float32(log_normalizer(scores))
    weights = np.exp(logs)
    # A banned token adds nothing to the entropy, and 0 * -inf would be NaN.
    entropy = -(np.where(weights > 0, logs, np.float32(0.0)) * weights).sum()
    distance = np.abs(-logs - entropy)
    kept = _lightest(distance, weights, mass * float(weights.sum(dtype=np.float64)))
    return np.flatnonzero(distance <= distance[kept].max())


def _lightest(keys: FloatArray, weights: FloatArray, needed: float) -> IntArray:
    """Positions of the smallest keys whose weights together reach `needed`, ascending.

    Sorting a vocabulary takes milliseconds. Summing the weights into bins of the key shows which bin
    holds the border, and only that one is sorted.

    Args:
        keys: `(n,)` float32, >= 0.
        weights: `(n,)` float32, >= 0.
        needed: At most the sum of the weights.
    """
    bins = np.minimum(keys * np.float32(_BINS_PER_UNIT), np.float32(_BINS - 1)).astype(np.intp)
    sums = np.bincount(bins, weights, _BINS).cumsum()
    border = min(int(sums.searchsorted(needed)), int(bins.max()))
    inside = np.flatnonzero(bins == border)
    inside = inside[np.argsort(keys[inside], kind="stable")]
    before = sums[border - 1] if border else 0.0
    count = int((before + weights[inside].cumsum(dtype=np.float64)).searchsorted(needed)) + 1
    kept = bins < border
    kept[inside[:count]] = True
    return np.flatnonzero(kept)
