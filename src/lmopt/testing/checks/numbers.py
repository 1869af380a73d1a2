"""Rules about what an engine computes."""

import functools
import unittest
from typing import Final

import numpy as np

from lmopt.contracts import PaddingSide, SupportsBest
from lmopt.errors import ShapeError, UnsupportedOptionError
from lmopt.evaluation.tolerances import tolerance_for
from lmopt.testing.case import Case
from lmopt.testing.judge import (
    PADDING_ID,
    feed,
    insist,
    insist_equal,
    insist_lengths,
    insist_logits,
    make_rows,
    pack,
    refuses,
    truth,
)

HALF_TYPES: Final = frozenset({"float16", "bfloat16"})
SIDES: Final[tuple[PaddingSide, ...]] = ("right", "left")


def check_agrees_with_reference(case: Case) -> None:
    """A forward pass over whole rows gives the logits of eager PyTorch."""
    rows = make_rows(case, [24, 24], seed=1)
    expected = truth(case, rows)
    with case.engine() as engine:
        given, state = feed(engine, rows)
    insist_lengths(state, [24, 24], "after the prompt")
    insist_equal(case, expected, given, "the prompt")
    if case.dtype in HALF_TYPES:
        error = max(float(np.abs(a - b).max()) for a, b in zip(expected, given, strict=True))
        scale = max(float(np.abs(a).max()) for a in expected)
        # Rounding the logits alone to 11 bits errs by more than this, float32 by less.
        insist(error > 2e-5 * scale, f"declared {case.dtype}, but the result has the precision of float32")


def check_batch_and_length_are_dynamic(case: Case) -> None:
    """Batch and length may be 1, odd, and larger than any example, in one engine and in any order."""
    with case.engine() as engine:
        for batch, length in ((3, 7), (1, 1), (5, 33), (1, 16), (2, 1)):
            rows = make_rows(case, [length] * batch, seed=batch + length)
            given, _ = feed(engine, rows)
            insist_equal(case, truth(case, rows), given, f"batch {batch}, length {length}")


def check_cached_decode_equals_full_forward(case: Case) -> None:
    """Reading one token at a time gives the logits of one pass over all of them."""
    rows = make_rows(case, [12, 12], seed=2)
    expected = truth(case, rows)
    with case.engine() as engine:
        _, state = feed(engine, [row[:5] for row in rows])
        for position in range(5, 12):
            given, state = feed(engine, [row[position : position + 1] for row in rows], state)
            insist_lengths(state, [position + 1] * 2, f"after {position + 1} tokens")
            here = [full[position : position + 1] for full in expected]
            insist_equal(case, here, given, f"token {position}")


def check_several_tokens_at_once(case: Case) -> None:
    """How a row's tokens are split over calls does not change its logits."""
    rows = make_rows(case, [14, 14], seed=3)
    expected = truth(case, rows)
    for split in ((3, 11), (1, 4, 2, 7), (13, 1)):
        with case.engine() as engine:
            state, start = None, 0
            for width in split:
                stop = start + width
                given, state = feed(engine, [row[start:stop] for row in rows], state)
                here = [full[start:stop] for full in expected]
                insist_equal(case, here, given, f"split {split}, tokens {start}..{stop - 1}")
                start = stop


def check_capacity_is_a_hint(case: Case) -> None:
    """The `capacity` that a state is begun with does not change results."""
    rows = make_rows(case, [9, 9], seed=4)
    with case.engine() as engine:
        for capacity in (9, 40):
            ids, lengths = pack(rows)
            logits, _ = engine.forward(ids, lengths, engine.begin(2, capacity=capacity))
            insist_equal(case, truth(case, rows), list(logits), f"capacity {capacity}")


def check_unequal_rows(case: Case) -> None:
    """Rows of unequal length, padded on either side, equal the same rows alone; else they are refused."""
    splits = ((7, 2, 4), (1, 3, 1), (2, 1, 5))
    rows = make_rows(case, [sum(parts) for parts in zip(*splits, strict=True)], seed=5)
    expected = truth(case, rows)
    with case.engine() as engine:
        if not engine.ragged:
            ids, lengths = pack(rows)
            refuses(
                lambda: engine.forward(ids, lengths, engine.begin(3)),
                ShapeError,
                when="unequal rows, where ragged is False,",
            )
            return
        for side in SIDES:
            state, start = engine.begin(3, padding_side=side), np.zeros(3, np.int64)
            for widths in splits:
                stop = start + widths
                spans = list(zip(start, stop, strict=True))
                given, state = feed(engine, [r[a:b] for r, (a, b) in zip(rows, spans, strict=True)], state)
                insist_lengths(state, stop.tolist(), f"of unequal rows, padded {side}")
                here = [full[a:b] for full, (a, b) in zip(expected, spans, strict=True)]
                insist_equal(case, here, given, f"unequal rows, padded {side}, at tokens {start.tolist()}")
                start = stop


def check_padding_has_no_effect(case: Case) -> None:
    """What `input_ids` holds beyond a row's length is never read, not even an id out of the vocabulary."""
    rows = make_rows(case, [6, 3], seed=6)
    expected = truth(case, rows)
    with case.engine() as engine:
        if not engine.ragged:
            raise unittest.SkipTest("the engine takes no unequal rows")
        for filler in (0, case.subject.facts.vocab_size - 1, PADDING_ID, 2**40):
            ids, lengths = pack(rows)
            ids[1, 3:] = filler
            logits, state = engine.forward(ids, lengths, engine.begin(2))
            here = [logits[0], logits[1, :3]]
            insist_equal(case, expected, here, f"padding filled with {filler}")
            more = make_rows(case, [2, 2], seed=7)
            longer = [np.concatenate(pair) for pair in zip(rows, more, strict=True)]
            given, _ = feed(engine, more, state)
            tails = [full[-2:] for full in truth(case, longer)]
            insist_equal(case, tails, given, f"tokens after padding filled with {filler}")


def check_last_only_is_the_last_position(case: Case) -> None:
    """`last_only` gives `(batch, 1, vocab)`: what follows each row's own last token."""
    with case.engine() as engine:
        lengths = [8, 5, 1] if engine.ragged else [8, 8, 8]
        rows = make_rows(case, lengths, seed=8)
        expected = [full[-1:] for full in truth(case, rows)]
        for side in SIDES:
            ids, counts = pack(rows)
            state = engine.begin(3, padding_side=side)
            logits, state = engine.forward(ids, counts, state, last_only=True)
            insist_logits(logits, (3, 1, engine.facts.vocab_size))
            insist_equal(case, expected, list(logits), f"last_only, padded {side}")
            more = make_rows(case, [3, 3, 3], seed=9)
            given, _ = feed(engine, more, state)
            longer = [np.concatenate(pair) for pair in zip(rows, more, strict=True)]
            tails = [full[-3:] for full in truth(case, longer)]
            insist_equal(case, tails, given, f"tokens after last_only, padded {side}")


def check_best_logits_are_those_of_forward(case: Case) -> None:
    """`forward_best` hands out the largest logits that `forward` gives, and leaves none out that ties with them."""
    with case.engine() as engine:
        if not isinstance(engine, SupportsBest) or not engine.most_best:
            raise unittest.SkipTest("the engine gives whole lines of logits only")
        lengths = [6, 4, 6] if engine.ragged else [6, 6, 6]
        rows, more = make_rows(case, lengths, seed=10), make_rows(case, [1, 1, 1], seed=11)
        _, state = feed(engine, rows)
        whole = [one[0] for one in feed(engine, more, state)[0]]
        for count in (1, min(5, engine.most_best)):
            _, state = feed(engine, rows)
            logits, ids, state = engine.forward_best(np.stack(more), state, count)
            insist_lengths(state, [length + 1 for length in lengths], f"after forward_best({count})")
            for line, best, named in zip(whole, logits, ids, strict=True):
                kept = np.arange(line.size) if named is None else named
                last, tie = np.sort(line)[-count], tolerance_for(case.dtype).tie
                insist(bool((kept[:-1] < kept[1:]).all()), f"the ids {kept.tolist()} do not ascend")
                missing = np.setdiff1d(np.flatnonzero(line > last + tie * abs(last)), kept)
                insist(kept.size >= count and not missing.size, f"of the best {count}, {missing} are missing")
                insist(
                    bool(np.allclose(best, line[kept], rtol=tie, atol=tie)), "its logits are not forward's"
                )
            after = make_rows(case, [2, 2, 2], seed=12)
            given, _ = feed(engine, after, state)
            longer = [np.concatenate(three) for three in zip(rows, more, after, strict=True)]
            insist_equal(
                case, [full[-2:] for full in truth(case, longer)], given, "tokens after forward_best"
            )
        for count in (0, engine.most_best + 1):
            _, state = feed(engine, rows)
            refuses(
                functools.partial(engine.forward_best, np.stack(more), state, count),
                UnsupportedOptionError,
                when=f"asking for {count} of {engine.most_best} logits",
            )


NUMBER_CHECKS = (
    check_agrees_with_reference,
    check_batch_and_length_are_dynamic,
    check_cached_decode_equals_full_forward,
    check_several_tokens_at_once,
    check_capacity_is_a_hint,
    check_unequal_rows,
    check_padding_has_no_effect,
    check_last_only_is_the_last_position,
    check_best_logits_are_those_of_forward,
)
