"""An engine that takes equal rows only works with unequal ones."""

import numpy as np
import pytest
from generation_fakes import HashEngine

from lmopt.contracts import Engine
from lmopt.errors import UnsupportedError
from lmopt.generation.cohorts import CohortEngine, for_unequal_rows


def padded(rows):
    ids = np.full((len(rows), max(map(len, rows))), 49)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    return ids, np.array([len(row) for row in rows])


ROWS = [[1, 2, 3], [4], [5, 6, 7], [8, 9], [10]]


def test_a_ragged_engine_is_left_alone():
    engine = HashEngine()
    assert for_unequal_rows(engine) is engine
    assert isinstance(for_unequal_rows(HashEngine(ragged=False)), Engine)


def test_equals_a_ragged_engine_through_every_operation():
    reference, plain = HashEngine(), HashEngine(ragged=False)
    engines = [reference, CohortEngine(plain)]
    states = [engine.begin(len(ROWS)) for engine in engines]
    ids, lengths = padded(ROWS)

    def forward(new, new_lengths, last_only):
        results = []
        for number, engine in enumerate(engines):
            logits, states[number] = engine.forward(new, new_lengths, states[number], last_only=last_only)
            results.append(logits)
        valid = (
            np.arange(results[0].shape[1])
            < (np.ones_like(new_lengths) if last_only else new_lengths)[:, None]
        )
        assert results[0].shape == results[1].shape
        assert np.array_equal(results[0][valid], results[1][valid])
        assert np.array_equal(states[0].lengths, states[1].lengths)

    forward(ids, lengths, False)
    assert len(plain.calls) == 3  # lengths 1, 2 and 3
    for rows in ([4, 2, 0, 0, 3], [3, 1, 1, 0], [2, 0]):
        for number, engine in enumerate(engines):
            states[number] = engine.select(states[number], np.array(rows))
        forward(np.arange(len(rows))[:, None], np.ones(len(rows), np.int64), True)
    more = []
    for engine in engines:
        state = engine.begin(3)
        more.append(engine.forward(*padded([[1], [2, 3], [4, 5]]), state)[1])
    for number, engine in enumerate(engines):
        states[number] = engine.join([more[number], states[number]])
    forward(np.arange(5)[:, None], np.ones(5, np.int64), True)


def test_join_merges_rows_of_equal_length():
    plain = HashEngine(ragged=False)
    engine = CohortEngine(plain)
    states = [engine.forward(*padded(rows), engine.begin(2))[1] for rows in ([[1], [2, 3]], [[4, 5], [6]])]
    joined = engine.join(states)
    assert joined.lengths.tolist() == [1, 2, 2, 1]
    plain.calls.clear()
    engine.forward(np.zeros((4, 1), np.int64), np.ones(4, np.int64), joined)
    assert len(plain.calls) == 2


def test_a_shared_state_cannot_be_taken_apart():
    engine = CohortEngine(HashEngine(ragged=False))
    _, state = engine.forward(*padded([[1], [2]]), engine.begin(2))
    with pytest.raises(UnsupportedError, match="taken apart"):
        engine.forward(*padded([[1], [2, 3]]), state)
