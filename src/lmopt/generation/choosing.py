"""From the logits of several rows to the next token of each."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from lmopt.contracts import Engine, SupportsBest
from lmopt.errors import LmoptError
from lmopt.generation.rows import Row
from lmopt.generation.sampling import check_best, draw, narrow
from lmopt.types import FloatArray, IntArray

# Scores that are divided by one of these keep well clear of 0 and infinity.
_TEMPERATURES: Final = (0.01, 100.0)


def most_best(engine: Engine) -> int:
    """Most logits of a row that an engine can be asked for alone; 0 where it gives whole lines only."""
    return engine.most_best if isinstance(engine, SupportsBest) else 0


def best_needed(rows: Sequence[Row]) -> int:
    """How many of the largest logits settle the next token of each row; 0 where only whole lines do."""
    most = 1
    for row in rows:
        config = row.config
        if row.processors or row.lookup or config.wants_logprobs:
            return 0
        if config.do_sample:
            if config.top_k < 1 or not _TEMPERATURES[0] <= config.temperature <= _TEMPERATURES[1]:
                return 0
            most = max(most, config.top_k)
    return most


def give(
    rows: list[Row], logits: Sequence[FloatArray] | FloatArray, ids: Sequence[IntArray | None] | None = None
) -> list[Row]:
    """Choose the next token of each row and add it.

    A row for which that is impossible (NaN, no token left to choose) ends with its error; the others do
    not notice.

    Args:
        rows: Unfinished rows.
        logits: `(rows, vocab_size)` raw logits, or with `ids` a line a row.
        ids: What `SupportsBest.forward_best` says whose logits they are, for rows of which `best_needed` says that
            they settle the token.

    Returns:
        The rows that were given a token.
    """
    best: list[int] = (
        logits.argmax(axis=-1).tolist()
        if isinstance(logits, np.ndarray)
        else [int(line.argmax()) for line in logits]
    )
    given = []
    for number, row in enumerate(rows):
        try:
            token = _choose(logits[number], best[number], row, None if ids is None else ids[number])
        except LmoptError as error:
            row.fail(error)
            continue
        if row.config.logprobs:
            row.record(logits[number], token)
        row.accept(token)
        given.append(row)
    return given


def _choose(logits: FloatArray, best: int, row: Row, ids: IntArray | None) -> int:
    """Choose a row's token; `best` is where its logits are largest, or the first NaN."""
    # A row is processed alone: its arithmetic, rounding included, is then the same in any batch.
    check_best(float(logits[best]))
    scores = logits
    if row.processors:
        scores = logits.copy()
        for processor in row.processors:
            processor(scores, row.history)
        # Where all else was banned at most, what was best still is.
        if scores[best] != logits[best] or not all(processor.only_bans for processor in row.processors):
            best = int(scores.argmax())
            check_best(float(scores[best]))
    if row.config.do_sample:
        return draw(narrow(scores, row.config, ids), row.uniform())
    return best if ids is None else int(ids[best])
