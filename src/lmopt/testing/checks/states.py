"""Rules about states: rows are kept, reordered, repeated, joined, and never leak into each other."""

import threading
import unittest
from collections.abc import Sequence
from typing import Final

import numpy as np

from lmopt.contracts import Engine, State, SupportsRewind
from lmopt.errors import LmoptError, UnsupportedError
from lmopt.testing.case import Case
from lmopt.testing.judge import feed, insist, insist_equal, insist_lengths, make_rows, refuses, truth
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


def check_rewind_forgets_last_tokens(case: Case) -> None:
    """Rows that were rewound read on as if they had never read what they forgot; more cannot be kept than was read."""
    with case.engine() as engine:
        rewinding = _rewinding(engine)
        lengths = [6, 3, 4] if engine.ragged else [5, 5, 5]
        kept_lengths = (
            ([6, 1, 2], [2, 3, 0], [0, 0, 0]) if engine.ragged else ([5, 5, 5], [2, 2, 2], [0, 0, 0])
        )
        rows = make_rows(case, lengths, seed=70)
        for kept in kept_lengths:
            _, state = feed(engine, rows)
            state = rewinding.rewind(state, np.array(kept, np.int64))
            insist_lengths(state, kept, f"after rewind to {kept}")
            left = [row[:length] for row, length in zip(rows, kept, strict=True)]
            _continue(case, engine, state, left, f"after rewind to {kept}")
        _, state = feed(engine, rows)
        longer = np.array([*lengths[:2], lengths[2] + 1], np.int64)
        refuses(lambda: rewinding.rewind(state, longer), LmoptError, when="rewind to more than was read")


def check_rewind_again_and_again(case: Case) -> None:
    """Drafts that are read, rejected in part and read anew leave no trace, over many steps."""
    with case.engine() as engine:
        rewinding = _rewinding(engine)
        rows = make_rows(case, [7, 5] if engine.ragged else [6, 6], seed=71)
        given, state = feed(engine, [row[:1] for row in rows])
        for step in range(2, 1 + min(map(len, rows))):
            drafts = make_rows(case, [3, 3], seed=72 + step)
            for draft, row in zip(drafts, rows, strict=True):
                draft[0] = row[step - 1]
            given, state = feed(engine, drafts, state)
            expected = [full[step - 1 : step] for full in truth(case, [row[:step] for row in rows])]
            insist_equal(case, expected, [one[:1] for one in given], f"draft of step {step}")
            state = rewinding.rewind(state, np.full(len(rows), step))


def check_copy_is_independent(case: Case) -> None:
    """A copy and its original go their own ways, and copying leaves the original as it was."""
    with case.engine() as engine:
        rewinding = _rewinding(engine)
        rows = make_rows(case, [6, 3] if engine.ragged else [4, 4], seed=73)
        lengths = [len(row) for row in rows]
        _, state = feed(engine, rows)
        same, roomy = rewinding.copy(state), rewinding.copy(state, capacity=30)
        short = rewinding.rewind(rewinding.copy(state, capacity=max(lengths)), np.array([2, 2], np.int64))
        for one, words in ((state, "the original"), (same, "a copy"), (roomy, "a copy with more room")):
            insist_lengths(one, lengths, f"of {words} after copy")
        tails = [make_rows(case, [2, 2], seed=74 + index) for index in range(3)]
        for tail, one, words in zip(
            tails, (same, state, roomy), ("a copy", "the original", "another"), strict=True
        ):
            given, after = feed(engine, tail, one)
            read = [np.concatenate(pair) for pair in zip(rows, tail, strict=True)]
            insist_equal(case, [full[-2:] for full in truth(case, read)], given, f"{words} after copy")
            _continue(case, engine, after, read, f"{words} after copy")
        _continue(case, engine, short, [row[:2] for row in rows], "a copy that was rewound")


def check_unrewindable_state_says_so(case: Case) -> None:
    """`rewinds` is a bool; where it is `False`, `rewind` is refused rather than done wrong."""
    with case.engine() as engine:
        if not isinstance(engine, SupportsRewind):
            raise unittest.SkipTest("the engine has no SupportsRewind")
        insist(isinstance(engine.rewinds, bool), f"rewinds is {engine.rewinds!r}, not a bool")
        if engine.rewinds:
            return
        _, state = feed(engine, make_rows(case, [4], seed=78))
        refuses(
            lambda: engine.rewind(state, np.array([2], np.int64)),
            UnsupportedError,
            when="rewind where rewinds is False",
        )


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


def _rewinding(engine: Engine) -> SupportsRewind:
    if not isinstance(engine, SupportsRewind) or not engine.rewinds:
        raise unittest.SkipTest("the engine does not rewind this model")
    return engine


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
    check_rewind_forgets_last_tokens,
    check_rewind_again_and_again,
    check_copy_is_independent,
    check_unrewindable_state_says_so,
    check_threads_with_separate_states,
)
