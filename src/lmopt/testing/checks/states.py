"""Rules about states: rows are kept, reordered, repeated, joined, and never leak into each other."""

import threading
from collections.abc import Sequence
from typing import Final

import numpy as np

from lmopt.contracts import Engine, State
from lmopt.testing.case import Case
from lmopt.testing.judge import feed, insist, insist_equal, insist_lengths, make_rows, truth
from lmopt.types import IntArray

_THREADS: Final = 4
_ROUNDS: Final = 3


def check_select_keeps_reorders_repeats(case: Case) -> None:
    """`select` keeps, drops, reorders and repeats rows; repeated rows then go their own ways."""
    with case.engine() as engine:
        lengths = [6, 3, 4] if engine.ragged else [5, 5, 5]
        rows = make_rows(case, lengths, seed=10)
        for picked in ([0, 1, 2], [2, 0, 1], [1], [2, 2, 0, 2], [1, 1]):
            _, state = feed(engine, rows)
            state = engine.select(state, np.array(picked, np.int64))
            kept = [rows[index] for index in picked]
            insist_lengths(state, [len(row) for row in kept], f"after select {picked}")
            _continue(case, engine, state, kept, f"after select {picked}")


def check_join_appends_rows(case: Case) -> None:
    """`join` puts the rows of several states into one batch, in order."""
    with case.engine() as engine:
        shapes = ([4, 7], [2], [7, 7, 1]) if engine.ragged else ([5, 5], [5], [5, 5, 5])
        groups = [make_rows(case, lengths, seed=20 + index) for index, lengths in enumerate(shapes)]
        states = [feed(engine, group)[1] for group in groups]
        rows = [row for group in groups for row in group]
        state = engine.join(states)
        insist_lengths(state, [len(row) for row in rows], "after join")
        _continue(case, engine, state, rows, "after join")
        alone = engine.join([feed(engine, groups[0])[1]])
        _continue(case, engine, alone, groups[0], "after join of one state")


def check_joined_rows_can_be_split_again(case: Case) -> None:
    """Rows that were joined after decoding can be selected, decoded and joined once more."""
    with case.engine() as engine:
        lengths = [5, 3] if engine.ragged else [4, 4]
        rows = make_rows(case, lengths, seed=30)
        tail = make_rows(case, [1, 1], seed=31)
        _, first = feed(engine, rows)
        _, first = feed(engine, tail, first)
        read = [np.concatenate(pair) for pair in zip(rows, tail, strict=True)]
        fresh = make_rows(case, [len(read[0]), len(read[1])], seed=32)
        _, second = feed(engine, fresh)
        state = engine.select(engine.join([first, second]), np.array([3, 0, 1], np.int64))
        _continue(case, engine, state, [fresh[1], read[0], read[1]], "after join and select")


def check_states_are_independent(case: Case) -> None:
    """Several states of one engine can be alive at once, and calls may alternate between them."""
    with case.engine() as engine:
        rows = [make_rows(case, [6, 6], seed=40 + index) for index in range(3)]
        expected = [truth(case, pair) for pair in rows]
        states: list[State | None] = [None] * 3
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            for index in (1, 0, 2):
                parts = [row[start:stop] for row in rows[index]]
                given, states[index] = feed(engine, parts, states[index])
                here = [full[start:stop] for full in expected[index]]
                insist_equal(case, here, given, f"state {index} of three that alternate")


def check_threads_with_separate_states(case: Case) -> None:
    """`forward` may be called from several threads at once, each with its own states."""
    rows = [make_rows(case, [9 + index], seed=50 + index)[0] for index in range(_THREADS)]
    expected = truth(case, rows)
    errors: list[BaseException] = []
    together = threading.Barrier(_THREADS)

    with case.engine() as engine:

        def work(index: int) -> None:
            row, full = rows[index], expected[index]
            try:
                for _ in range(_ROUNDS):
                    together.wait(timeout=120)
                    given, state = feed(engine, [row[:4]])
                    insist_equal(case, [full[:4]], given, f"thread {index}, prompt")
                    for position in range(4, len(row)):
                        given, state = feed(engine, [row[position : position + 1]], state)
                        here = [full[position : position + 1]]
                        insist_equal(case, here, given, f"thread {index}, token {position}")
            except BaseException as error:
                errors.append(error)
                together.abort()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # A barrier that was broken by one thread's error fails the others too: show the cause.
    causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] or errors
    insist(not errors, f"{len(errors)} of {_THREADS} threads failed; first: {causes[0] if causes else ''}")


def _continue(case: Case, engine: Engine, state: State, read: Sequence[IntArray], what: str) -> None:
    """Let a state read on, twice, and insist that every row still knows its own past."""
    longer = list(read)
    for width in (1, 2):
        more = make_rows(case, [width] * len(longer), seed=60 + width)
        longer = [np.concatenate(pair) for pair in zip(longer, more, strict=True)]
        given, state = feed(engine, more, state)
        expected = [full[-width:] for full in truth(case, longer)]
        insist_equal(case, expected, given, f"{what}, {width} more token(s)")
        insist_lengths(state, [len(row) for row in longer], f"{what}, {width} more token(s)")


STATE_CHECKS = (
    check_select_keeps_reorders_repeats,
    check_join_appends_rows,
    check_joined_rows_can_be_split_again,
    check_states_are_independent,
    check_threads_with_separate_states,
)
