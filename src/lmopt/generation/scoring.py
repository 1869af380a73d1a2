"""Log-probabilities of given tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from lmopt.contracts import Engine, State
from lmopt.errors import ContextLengthError, EmptyPromptError, InputError
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.generation.prompts import check_ids
from lmopt.generation.sampling import largest, log_normalizer
from lmopt.generation.sources import begin, check_source
from lmopt.types import AnyArray, FloatArray, IntArray

_LOGIT_BYTES: Final = 128 * 2**20


def score(
    engine: Engine,
    rows: Sequence[Sequence[int] | IntArray],
    *,
    sources: Sequence[Any] | None = None,
    batch_size: int = 8,
    logit_bytes: int = _LOGIT_BYTES,
) -> list[FloatArray]:
    """Compute the log-probability of each token of given rows, given those before it.

    Args:
        engine: Any engine.
        rows: Token ids, at least one a row, of any lengths.
        sources: What the encoder reads before each row; `None` for models without one.
        batch_size: Most rows in one call of the engine.
        logit_bytes: Most bytes of logits in one call: longer rows are read in parts.

    Returns:
        For each row of `n` tokens, `(n - 1,)` float32: the natural-log probability of its second to
        last token. The first token has nothing before it that could predict it.

    Raises:
        EmptyPromptError: A row has no token.
        ContextLengthError: A row is longer than the model's context.
        TokenIdError: An id is outside the vocabulary.
    """
    return _score(engine, rows, sources, 0, batch_size, logit_bytes)[0]


def score_with_top(
    engine: Engine, rows: Sequence[Sequence[int] | IntArray], top: int
) -> tuple[list[FloatArray], list[list[dict[int, float]]]]:
    """Compute what `score` does, and the likeliest tokens at each of those places.

    Args:
        engine: Any engine.
        rows: As for `score`.
        top: How many of the likeliest tokens, at least 0.

    Returns:
        The scores; and for each row `n - 1` mappings from id to natural-log probability, best first.

    Raises:
        InputError: As `score` does.
    """
    return _score(engine, rows, None, top, 8, _LOGIT_BYTES)


def _score(
    engine: Engine,
    rows: Sequence[Sequence[int] | IntArray],
    sources: Sequence[Any] | None,
    top: int,
    batch_size: int,
    logit_bytes: int,
) -> tuple[list[FloatArray], list[list[dict[int, float]]]]:
    facts = engine.facts
    checked = [check_ids(row, facts.vocab_size, f"row {number}") for number, row in enumerate(rows)]
    for number, ids in enumerate(checked):
        if ids.size == 0:
            raise EmptyPromptError(f"row {number} is empty: there is nothing to score. Leave it out.")
        if facts.context_length is not None and ids.size > facts.context_length:
            raise ContextLengthError(
                f"row {number} has {ids.size} tokens; the model's context has {facts.context_length}. "
                f"Split it, or use perplexity, which slides a window."
            )
    tops: list[list[dict[int, float]]] = [[] for _ in checked]
    given = [None] * len(checked) if sources is None else list(sources)
    if len(given) != len(checked):
        raise InputError(f"{len(given)} sources were given for {len(checked)} rows. Give one a row.")
    read = [check_source(one, facts, f"source {number}") for number, one in enumerate(given)]
    scores: list[FloatArray] = [np.empty(ids.size - 1, np.float32) for ids in checked]
    # Neighbours of like length waste little on padding.
    order = sorted((n for n in range(len(checked)) if checked[n].size > 1), key=lambda n: checked[n].size)
    width = max(1, logit_bytes // (4 * facts.vocab_size * max(1, min(batch_size, len(order)))))
    batches = _batches(checked, order, batch_size, equal=not engine.ragged)
    if facts.source is not None:
        # Rows of equal length may still have sources that are not.
        engine = for_unequal_rows(engine)
    for batch in batches:
        parts = _score_batch(
            engine, [checked[n] for n in batch], [read[n] for n in batch], [scores[n] for n in batch], width
        )
        for place, logits in parts:
            if top:
                tops[batch[place]] += [_likeliest(line, top) for line in logits]
    return scores, tops


def _likeliest(logits: FloatArray, top: int) -> dict[int, float]:
    normalizer = log_normalizer(logits)
    return {one: float(logits[one]) - normalizer for one in largest(logits, top).tolist()}


def _batches(rows: list[IntArray], order: list[int], size: int, *, equal: bool) -> list[list[int]]:
    """Cut `order` into batches; of equal lengths where the engine takes no others."""
    batches: list[list[int]] = []
    for number in order:
        fits = batches and len(batches[-1]) < size
        if fits and (not equal or rows[batches[-1][0]].size == rows[number].size):
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


def _score_batch(
    engine: Engine,
    rows: list[IntArray],
    sources: list[AnyArray | None],
    scores: list[FloatArray],
    width: int,
) -> Iterator[tuple[int, FloatArray]]:
    """Score rows that ascend in length, `width` tokens of each at a time; fills `scores`.

    Yields:
        Place of a row, and the logits for its next tokens.
    """
    # The last token is only predicted, never read.
    state = begin(engine, sources, capacity=rows[-1].size - 1)
    for number, start, logits in read_in_parts(engine, state, rows, list(range(len(rows))), width):
        targets = rows[number][start + 1 : start + 1 + len(logits)]
        scores[number][start : start + len(logits)] = token_logprobs(logits, targets)
        yield number, logits


def read_in_parts(
    engine: Engine, state: State, rows: Sequence[IntArray], active: list[int], width: int
) -> Iterator[tuple[int, int, FloatArray]]:
    """Read rows together, all but the last token of each, some tokens of each at a time.

    Args:
        engine: Engine that takes rows of unequal length, or all are equal.
        state: Of the rows in `active`; consumed.
        rows: Token ids.
        active: Numbers of the rows to read, in the order that they have in the state.
        width: Most tokens of a row in one call.

    Yields:
        Number of a row, place of the first token that was read, and the `(n, vocab_size)` logits after it and
        those that follow.
    """
    for start in range(0, max(rows[number].size for number in active) - 1, width):
        kept = [place for place, number in enumerate(active) if rows[number].size - 1 > start]
        if len(kept) < len(active):
            state = engine.select(state, np.array(kept))
            active = [active[place] for place in kept]
        lengths = np.array([min(width, rows[number].size - 1 - start) for number in active])
        input_ids = np.zeros((len(active), lengths.max()), np.int64)
        for line, number, length in zip(input_ids, active, lengths, strict=True):
            line[:length] = rows[number][start : start + length]
        logits, state = engine.forward(input_ids, lengths, state)
        for line, number, length in zip(logits, active, lengths, strict=True):
            yield number, start, line[:length]


def token_logprobs(logits: FloatArray, targets: IntArray) -> FloatArray:
    """Log-probability of `(n,)` target ids under `(n, vocab_size)` logits; `(n,)` float32."""
    best = logits.max(axis=-1, keepdims=True)
    sums = np.exp(logits - best).sum(axis=-1, dtype=np.float64)
    chosen = logits[np.arange(targets.size), targets].astype(np.float64)
    result: FloatArray = (chosen - best[:, 0] - np.log(sums)).astype(np.float32)
    return result
