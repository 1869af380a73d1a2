"""From the logits of several rows to the next token of each."""

import numpy as np

from lmopt.errors import LmoptError
from lmopt.generation.rows import Row
from lmopt.generation.sampling import check_best, draw, narrow
from lmopt.types import FloatArray


def give(rows: list[Row], logits: FloatArray) -> list[Row]:
    """Choose the next token of each row and add it.

    A row for which that is impossible (NaN, no token left to choose) ends with its error; the others do
    not notice.

    Args:
        rows: Unfinished rows.
        logits: `(rows, vocab_size)` raw logits.

    Returns:
        The rows that were given a token.
    """
    plain = not any(row.processors or row.config.do_sample for row in rows)
    if plain:
        tokens = logits.argmax(axis=-1).tolist()
        # NaN and minus infinity, which `argmax` would return first or last, are not above.
        if not (logits[np.arange(len(rows)), tokens] > -np.inf).all():
            plain = False
    given = []
    for number, row in enumerate(rows):
        try:
            token = tokens[number] if plain else _choose(logits[number], row)
        except LmoptError as error:
            row.fail(error)
            continue
        if row.config.logprobs:
            row.record(logits[number], token)
        row.accept(token)
        given.append(row)
    return given


def _choose(logits: FloatArray, row: Row) -> int:
    # A row is processed alone: its arithmetic, rounding included, is then the same in any batch.
    check_best(float(logits.max()))
    scores = logits
    if row.processors:
        scores = logits.copy()
        for processor in row.processors:
            processor(scores, row.history)
        check_best(float(scores.max()))
    return draw(narrow(scores, row.config), row.uniform()) if row.config.do_sample else int(scores.argmax())
