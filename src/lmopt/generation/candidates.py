"""The best continuations of a prompt's beams, found without a log-probability for each token of the vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lmopt.generation.sampling import check_best, largest, log_normalizer
from lmopt.types import FloatArray, IntArray

# Sums of float32 numbers are rounded by 2**-24 of what they come to: what is further apart than this stays apart.
_ROUNDING: Final = np.float32(2.0**-22)
_LANES: Final = 64  # values whose largest is looked at first


@dataclass(frozen=True, slots=True)
class Candidates:
    """Continuations of beams, best first; the one of the earlier beam, then of the lower id, among equals.

    Attributes:
        parents: `(n,)` int64, the beam that each continues.
        ids: `(n,)` int64, its token.
        scores: `(n,)` float32, score of the beam with it.
        logprobs: `(n,)` float32, the token's log-probability, which nothing but the model has a say in.
    """

    parents: IntArray
    ids: IntArray
    scores: FloatArray
    logprobs: FloatArray


def best_of_scores(scores: FloatArray, logprobs: FloatArray, running: FloatArray, count: int) -> Candidates:
    """Find the best continuations where each token has a score of its own.

    Args:
        scores: `(beams, vocab_size)` float32, added to the beams' scores.
        logprobs: `(beams, vocab_size)` float32 log-probabilities.
        running: `(beams,)` float32, the beams' scores.
        count: How many are wanted.

    Raises:
        EngineError, UnsupportedOptionError: As `check_best`.
    """
    total = (scores + running[:, None]).ravel()
    check_best(float(total.max()))
    best = largest(total, count)
    parents, ids = best // scores.shape[1], best % scores.shape[1]
    return Candidates(parents, ids, total[best], logprobs[parents, ids])


def best_of_logits(
    logits: FloatArray, running: FloatArray, count: int, banned: Sequence[IntArray]
) -> Candidates | None:
    """Find the same, bit by bit, where scores are log-probabilities and some tokens are banned.

    No beam has more than `count` among the best; the others of its tokens only count in the sum of probabilities.

    Args:
        logits: `(beams, vocab_size)` float32.
        running: `(beams,)` float32, the beams' scores.
        count: How many are wanted.
        banned: For each beam, ids that it may not go on with.

    Returns:
        The continuations; `None` where the vocabulary is too small, or too much is banned, for that to be quicker.

    Raises:
        EngineError: As `check_best`.
    """
    beams, vocab_size = logits.shape
    wanted = count + max(one.size for one in banned)
    lanes = vocab_size // _LANES
    if wanted > lanes // 4:
        return None
    # The largest values stand in as many groups of values, disjoint ones, those with the largest maxima.
    table, rest = logits[:, : lanes * _LANES].reshape(beams, _LANES, lanes), logits[:, lanes * _LANES :]
    maxima = table.max(axis=1)
    best = np.maximum(maxima.max(axis=1), rest.max(axis=1, initial=-np.inf))
    work = np.empty_like(logits[0])
    normalizers = np.array(
        [log_normalizer(line, out=work, best=most) for line, most in zip(logits, best, strict=True)],
        np.float32,
    )
    check_best(float(normalizers.max()))
    border = np.partition(maxima, lanes - wanted, axis=1)[:, lanes - wanted]
    # What sums with the beam's score round away must not decide who is looked at.
    border -= _ROUNDING * (2 * np.abs(border - normalizers) + np.abs(running))
    beam, column = (maxima >= border[:, None]).nonzero()
    place, lane = (table[beam, :, column] >= border[beam, None]).nonzero()
    found = [beam[place] * vocab_size + lane * lanes + column[place]]
    if rest.size:
        beam, column = (rest >= border[:, None]).nonzero()
        found.append(beam * vocab_size + lanes * _LANES + column)
    places = np.sort(np.concatenate(found))
    forbidden = np.concatenate([beam * vocab_size + ids for beam, ids in enumerate(banned)])
    if forbidden.size:
        places = places[np.isin(places, forbidden, invert=True)]
    if places.size < count:
        return None
    parents = places // vocab_size
    logprobs = logits.ravel()[places] - normalizers[parents]
    total = logprobs + running[parents]
    check_best(float(total.max()))
    order = np.argsort(-total, kind="stable")[:count]
    parents = parents[order]
    return Candidates(parents, places[order] - parents * vocab_size, total[order], logprobs[order])
