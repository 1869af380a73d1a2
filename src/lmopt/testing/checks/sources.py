"""Rules about encoder-decoders: what a row holds of its source is its own, and is read once."""

import unittest
from functools import partial

import numpy as np

from lmopt.errors import DtypeError, LmoptError, ShapeError, TokenIdError
from lmopt.testing.case import Case, draw_source
from lmopt.testing.judge import (
    PADDING_ID,
    feed,
    insist,
    insist_equal,
    insist_lengths,
    make_rows,
    refuses,
)
from lmopt.testing.sourced import SourcedEngine
from lmopt.types import AnyArray, IntArray


def check_sources_of_unequal_length(case: Case) -> None:
    """Rows with sources of unequal length share a batch where `ragged_sources` says so, through select and join."""
    with case.engine() as engine:
        encoder = _sourced(engine).encoder
        lengths = [7, 3, 5] if encoder.ragged_sources else [5, 5, 5]
        sources = [draw_source(case.subject.facts, length, seed=90 + n) for n, length in enumerate(lengths)]
        state = encoder.encode(*_pack(sources))
        insist_lengths(state, [0, 0, 0], "after encode")
        rows = make_rows(case, [4, 4, 4], seed=95)
        given, state = feed(engine, rows, state)
        insist_equal(case, _truth(case, rows, sources), given, "rows with sources of their own")
        picked = [2, 0, 0]
        state = engine.select(state, np.array(picked, np.int64))
        other = draw_source(case.subject.facts, 9 if encoder.ragged_sources else 5, seed=99)
        (row,) = make_rows(case, [4], seed=96)
        _, single = feed(engine, [row], encoder.encode(*_pack([other])))
        state = engine.join([state, single])
        read = [*(rows[n] for n in picked), row]
        own = [*(sources[n] for n in picked), other]
        for step in range(2):
            more = make_rows(case, [1] * 4, seed=97 + step)
            read = [np.concatenate(pair) for pair in zip(read, more, strict=True)]
            given, state = feed(engine, more, state)
            last = [full[-1:] for full in _truth(case, read, own)]
            insist_equal(case, last, given, "rows that were selected and joined")


def check_encoded_shows_the_source_alone(case: Case) -> None:
    """`encoded` depends on the source only: not on the rows beside it, nor on what the decoder has read."""
    with case.engine() as engine:
        encoder = _sourced(engine).encoder
        lengths = [6, 4] if encoder.ragged_sources else [6, 6]
        sources = [draw_source(case.subject.facts, length, seed=80 + n) for n, length in enumerate(lengths)]
        state = encoder.encode(*_pack(sources))
        before = encoder.encoded(state)
        _, state = feed(engine, make_rows(case, [3, 3], seed=82), state)
        after = encoder.encoded(state)
        insist(
            bool(before) and before.keys() == after.keys(), "encoded must show the same names, at least one"
        )
        for place, source in enumerate(sources):
            alone = encoder.encoded(encoder.encode(*_pack([source])))
            for name, array in alone.items():
                own = tuple(slice(size) for size in array[0].shape)
                for shown, when in ((before, "beside another"), (after, "after the decoder has read")):
                    close = np.allclose(shown[name][place][own], array[0], rtol=1e-3, atol=1e-3)
                    insist(close, f"encoded[{name!r}] of source {place} {when} differs from that of it alone")


def check_bad_sources_are_refused(case: Case) -> None:
    """Sources that the encoder cannot take raise a typed error, and so does a row without one."""
    wanted = case.subject.facts.source
    assert wanted is not None
    with case.engine() as engine:
        encoder = _sourced(engine).encoder
        refuses(lambda: _sourced(engine).inner.begin(1), LmoptError, when="begin without a source")
        inputs, lengths = _pack([draw_source(case.subject.facts, 5, seed=85)])
        refuses(partial(encoder.encode, inputs, np.array([0])), ShapeError, when="a source of no positions")
        refuses(partial(encoder.encode, inputs[0], lengths), ShapeError, when="inputs without a batch")
        if wanted.kind == "ids":
            inputs[0, 2] = wanted.size
            refuses(
                partial(encoder.encode, inputs, lengths), TokenIdError, when="an id outside the vocabulary"
            )
        else:
            whole = np.zeros(inputs.shape, np.int64)
            refuses(partial(encoder.encode, whole, lengths), DtypeError, when="whole numbers as features")


def _sourced(engine: object) -> SourcedEngine:
    if not isinstance(engine, SourcedEngine):
        raise unittest.SkipTest("the model has no encoder")
    return engine


def _pack(sources: list[AnyArray]) -> tuple[AnyArray, IntArray]:
    """Lay sources side by side; padding is what no encoder must read."""
    lengths = np.array([one.shape[-1] for one in sources], np.int64)
    padding = PADDING_ID if sources[0].dtype.kind == "i" else np.nan
    inputs = np.full((len(sources), *sources[0].shape[:-1], int(lengths.max())), padding, sources[0].dtype)
    for line, one in zip(inputs, sources, strict=True):
        line[..., : one.shape[-1]] = one
    return inputs, lengths


def _truth(case: Case, rows: list[IntArray], sources: list[AnyArray]) -> list[AnyArray]:
    return [case.subject.reference(row, source) for row, source in zip(rows, sources, strict=True)]


SOURCE_CHECKS = (
    check_sources_of_unequal_length,
    check_encoded_shows_the_source_alone,
    check_bad_sources_are_refused,
)
