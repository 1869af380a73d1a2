import gc
import json
import weakref

import numpy as np
import pytest
from defects import healthy
from small_decoder import Config, Decoder, oracle, with_weight

from lmopt.errors import (
    EngineError,
    InputError,
    ParityError,
    ShapeError,
    TokenIdError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.evaluation.cases import make_rows
from lmopt.evaluation.divergence import LogitsDifference, compare_logits
from lmopt.evaluation.parity import Examination, engine_reference, engine_rounding, measure, require
from lmopt.evaluation.report import CaseResult, ParityReport
from lmopt.evaluation.tolerances import TOLERANCES, Tolerance
from lmopt.types import ModelFacts

CASES = ["prefill", "decode", "several", "batch-right", "batch-left", "select/join", "greedy"]


def reference(config=None):
    return oracle(config or Config(), healthy().weights)


def scaled():
    return with_weight(healthy(), "model.layers.1.mlp.up_proj", lambda w: w * 1.01)


@pytest.mark.parametrize("context", [4, 5, 8, 16, 32, 64, 200, None])
def test_any_context_length_is_used_to_its_end_and_not_beyond(context):
    config = Config(context=context)
    oracle_logits = reference(config)
    asked = []

    def watched(ids):
        asked.append(len(ids))
        return oracle_logits(ids)

    class Bounded(Decoder):
        def forward(self, input_ids, lengths, state, **options):
            if self.config.context:
                assert (state.lengths + lengths).max() <= self.config.context
            return super().forward(input_ids, lengths, state, **options)

    report = measure(watched, Bounded(config))
    assert report.ok
    assert [case.case for case in report.cases] == CASES
    assert sum(asked) <= 600
    if context and context <= 130:
        assert max(asked) == context


def test_prompt_lengths_not_seen_at_export_are_tried():
    assert measure(reference(), healthy()).lengths == (1, 2, 7, 33, 130)
    assert measure(reference(), healthy(), lengths=(5,)).ok


def test_every_prompt_and_position_of_a_row_is_compared():
    report = measure(reference(), healthy())
    positions = {case.case: case.difference.positions for case in report.cases}
    assert positions["prefill"] == 1 + 2 + 7 + 33 + 130
    # chunks of 1, 3, 5, 2, 4 tokens, then six single ones a row
    assert positions["batch-right"] == positions["batch-left"] == 173 + 15 + 5 * 6
    assert positions["greedy"] == 4 * 32


def test_left_padding_is_asked_for():
    sides = []

    class Watched(Decoder):
        def begin(self, batch, *, capacity=None, padding_side="right"):
            sides.append((batch, padding_side))
            assert capacity
            return super().begin(batch, capacity=capacity, padding_side=padding_side)

    measure(reference(), Watched(Config()))
    assert {(5, "left"), (5, "right")} <= set(sides)


def test_the_same_seed_gives_the_same_report():
    first, second = (json.dumps(measure(reference(), healthy(), seed=3).to_dict()) for _ in range(2))
    assert first == second
    assert first != json.dumps(measure(reference(), healthy(), seed=4).to_dict())


def test_the_report_is_plain_json_without_nan():
    class Broken(Decoder):
        def last(self, logits, lengths):
            return super().last(logits, lengths) * np.nan

    report = measure(reference(), Broken(Config()))
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert not json.loads(text)["ok"]
    assert json.loads(text)["cases"]["greedy"]["nonfinite"] == 128


def test_progress_reaches_its_total():
    calls = []
    measure(reference(), healthy(), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 7) for n in range(8)]


def test_require_lets_a_good_report_through():
    require(measure(reference(), healthy()), what="it")


def test_require_says_numbers_limits_case_and_next_step():
    report = measure(reference(), scaled())
    with pytest.raises(ParityError) as caught:
        require(report, what="the export of x", locate="lmopt compare a b --bisect")
    message = str(caught.value)
    worst = report.worst.difference
    for part in (
        "the export of x",
        repr(report.worst.case),
        f"{worst.max_abs:.2e}",
        "1e-04 x |reference|",
        f"mean KL {worst.kl_mean:.2e} > 1e-08",
        "lmopt compare a b --bisect",
        "batch-left",
        *report.lines(),
    ):
        assert part in message
    assert caught.value.report is report


def test_a_half_type_has_room_that_float32_has_not():
    def coarse(w):  # ten bits of mantissa, as float16 has
        return w.astype(np.float16).astype(np.float32)

    weights = {name: coarse(weight) for name, weight in healthy().weights.items()}
    engine = Decoder(Config(), weights, dtype="float16")
    assert measure(reference(), engine, dtype="float16").ok
    assert not measure(reference(), engine, dtype="float32").ok


def test_a_tolerance_of_ones_own():
    wide = Tolerance("wide", kl_mean=1, top1=0, perplexity_ratio=9)
    assert measure(reference(), scaled(), tolerance=wide).ok


def test_an_engine_is_a_reference_too():
    assert measure(engine_reference(healthy()), healthy()).ok
    assert not measure(engine_reference(scaled()), healthy()).ok


def test_a_vocabulary_that_differs_is_told():
    with pytest.raises(ShapeError, match="unpadded"):
        measure(lambda ids: np.zeros((len(ids), 95), np.float32), healthy())

    class Padded(Decoder):
        def forward(self, *args, **options):
            logits, state = super().forward(*args, **options)
            return np.pad(logits, ((0, 0), (0, 0), (0, 4))), state

    with pytest.raises(EngineError, match="100"):
        measure(reference(), Padded(Config()))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float8"}, UnsupportedOptionError),
        ({"prompts": []}, InputError),
        ({"prompts": [[]]}, InputError),
        ({"prompts": [[1, 96]]}, TokenIdError),
        ({"prompts": [[-1]]}, TokenIdError),
        ({"lengths": ()}, InputError),
        ({"lengths": (0, 3)}, InputError),
        ({"facts": ModelFacts(96, 3)}, UnsupportedError),
    ],
)
def test_requests_that_make_no_sense(options, error):
    with pytest.raises(error):
        measure(reference(), healthy(), **options)


def test_rows_begin_where_prompts_begin():
    prompts = [[10, 11, 12, 13], [20, 21], [30, 31, 32]]
    rows = make_rows(ModelFacts(96, None), prompts, (1, 2, 3, 4), 0)
    assert [row.ids[0] for row in rows[:3]] == [10, 20, 30]
    assert rows[0].ids[:6].tolist() == [10, 11, 12, 13, 20, 21]
    assert len({tuple(row.ids[:4]) for row in rows}) == 4


def difference(**changes):
    same = compare_logits(np.ones((200, 4), np.float32), np.ones((200, 4), np.float32))
    return LogitsDifference(**{**{name: getattr(same, name) for name in same.__slots__}, **changes})


@pytest.mark.parametrize(
    ("dtype", "changes", "ok"),
    [
        ("float32", {}, True),
        ("float32", {"max_ratio": 1.0}, True),
        ("float32", {"max_ratio": 1.001}, False),
        ("float32", {"kl_mean": 1e-8}, True),
        ("float32", {"kl_mean": 1.1e-8}, False),
        ("float32", {"top1_misses": 1}, False),
        ("float32", {"nonfinite": 1}, False),
        ("float32", {"positions": 0}, False),
        ("float32", {"kl_mean": float("nan")}, False),
        ("float16", {"top1_misses": 1}, True),  # 99.5 % of 200
        ("float16", {"top1_misses": 2}, False),
        ("float16", {"top1_misses": 1, "positions": 40}, True),  # a short case may miss one
        ("float16", {"top1_misses": 2, "positions": 40}, False),
        ("float16", {"top1_misses": 0, "nonfinite": 1}, False),
        ("bfloat16", {"top1_misses": 2}, True),
        ("bfloat16", {"top1_misses": 3}, False),
        ("bfloat16", {"kl_mean": 6e-4}, False),
        ("int4", {"top1_misses": 20}, True),
        ("int4", {"top1_misses": 21}, False),
    ],
)
def test_verdicts_at_the_limits(dtype, changes, ok):
    result = CaseResult.judge("x", difference(**changes), TOLERANCES[dtype])
    assert result.ok is ok
    assert (result.severity > 1) is not ok


def test_a_report_without_cases_has_not_passed():
    assert not ParityReport("x", TOLERANCES["float32"], (), (), "random", 0).ok


class EqualRows(Decoder):
    """Takes rows of equal length only, as a recurrent model does."""

    def __post_init__(self):
        super().__post_init__()
        self.ragged = False

    def forward(self, input_ids, lengths, state, **options):
        assert len(set(lengths)) == 1
        assert input_ids.shape[1] == lengths[0]
        assert len(set(state.lengths)) == 1
        return super().forward(input_ids, lengths, state, **options)

    def join(self, states):
        assert len({int(length) for state in states for length in state.lengths}) == 1
        return super().join(states)


@pytest.mark.parametrize("context", [4, 9, 32, None])
def test_an_engine_of_equal_rows_is_measured_in_every_case(context):
    config = Config(context=context)
    report = measure(reference(config), EqualRows(config))
    assert report.ok
    assert [case.case for case in report.cases] == CASES
    weights = scaled().weights
    assert not any(case.ok for case in measure(reference(config), EqualRows(config, weights)).cases)


# Turns and rounding -----------------------------------------------------------------------------


def test_reference_and_candidate_take_turns():
    """Neither is asked while the other one is at work, so that either may give its memory back."""
    oracle_logits = reference()
    at_work = "reference"

    def watched(ids):
        assert at_work == "reference"
        return oracle_logits(ids)

    def rounding(ids):
        watched(ids)
        return np.full(len(ids), 1.0, np.float32)

    class Watched(Decoder):
        def forward(self, *args, **options):
            assert at_work == "candidate"
            return super().forward(*args, **options)

    config = Config()
    examination = Examination(watched, facts=healthy().facts, rounding=rounding)
    at_work = "candidate"
    examination.run(Watched(config, scaled().weights))
    at_work = "reference"
    report = examination.report()
    assert [case.case for case in report.cases] == CASES
    assert not report.ok


def shifted(row, place, by):
    """Logits of the healthy decoder with one of them moved at the last position of a given length."""

    class Shifted(Decoder):
        def forward(self, input_ids, lengths, state, **options):
            logits, after = super().forward(input_ids, lengths, state, **options)
            if input_ids.shape == (1, row):
                logits = logits.copy()
                logits[0, place, 5] += by
            return logits, after

    return Shifted(Config())


@pytest.mark.parametrize(
    ("uncertain", "by", "ok"),
    [
        (None, 4e-4, False),
        (0.0, 4e-4, False),
        (1e-4, 4e-4, True),  # three times 1e-4 is added to 1e-4 x (1 + |reference|)
        (1e-5, 4e-4, False),
        (1.0, 9e-4, True),
        (1.0, 5e-3, False),  # no more than ten times 1e-4 is ever added
    ],
)
def test_where_the_reference_is_uncertain_a_larger_error_passes(uncertain, by, ok):
    asked = []

    def rounding(ids):
        asked.append(len(ids))
        if uncertain is None:
            return None
        found = np.zeros(len(ids), np.float32)
        found[20] = uncertain
        return found

    report = measure(reference(), shifted(33, 20, by), rounding=rounding)
    verdicts = {case.case: case.ok for case in report.cases}
    assert verdicts == dict.fromkeys(CASES, True) | {"prefill": ok}
    again = [33 + 2 + 6] if uncertain is None else [33 + 2 + 6, 130 + 4 + 6]
    assert asked == again, "only the row in doubt and the longest are read again, once"


def test_uncertainty_excuses_its_own_position_only():
    def rounding(ids):
        return ((len(ids) == 33 + 2 + 6) & (np.arange(len(ids)) != 20)).astype(np.float32)

    assert not measure(reference(), shifted(33, 20, 4e-4), rounding=rounding).ok
    assert measure(reference(), shifted(33, 19, 4e-4), rounding=rounding).ok


@pytest.mark.parametrize(("share", "ok"), [(0.6, True), (0.4, False)])
def test_no_position_is_more_certain_than_half_of_the_longest_row(share, ok):
    def rounding(ids):
        return (
            np.full(len(ids), 1e-4, np.float32) * (len(ids) > 100) * (np.arange(len(ids)) < share * len(ids))
        )

    assert measure(reference(), shifted(33, 20, 4e-4), rounding=rounding).ok == ok


@pytest.mark.parametrize(("position", "ok"), [(135, True), (0, False), (134, False)])
def test_uncertainty_belongs_to_the_position_in_the_row(position, ok):
    class Shifted(Decoder):
        def forward(self, input_ids, lengths, state, **options):
            logits, after = super().forward(input_ids, lengths, state, **options)
            if input_ids.shape == (1, 1) and state.lengths[0] == 135:
                logits = logits + np.float32(4e-4)
            return logits, after

    def rounding(ids):
        return (np.arange(len(ids)) == position).astype(np.float32)

    assert measure(reference(), Shifted(Config()), rounding=rounding).ok == ok


def test_the_reference_is_not_read_twice_where_all_is_well():
    def rounding(ids):
        pytest.fail("nothing was in doubt")

    assert measure(reference(), healthy(), rounding=rounding).ok


def test_an_engine_tells_its_own_rounding():
    class Coarse(Decoder):
        def forward(self, input_ids, lengths, state, **options):
            logits, after = super().forward(input_ids, lengths, state, **options)
            return logits + np.float32(0.25) * (input_ids.shape[1] < 7), after

    ids = np.arange(3, 20)
    found = engine_rounding(Coarse(Config()))(ids)
    assert found.shape == (17,)
    assert found[:14] == pytest.approx(0, abs=1e-5)
    assert found[14:] == pytest.approx(0.25, abs=1e-5)


def test_what_the_reference_said_is_out_of_memory_while_the_candidate_runs():
    given, said = [], reference()

    def watched(ids):
        logits = said(ids)
        given.append(weakref.ref(logits))
        return logits

    def alive(done, total):
        assert not any(one() is not None for one in given)

    examination = Examination(watched, facts=healthy().facts, progress=alive)
    assert given
    examination.run(healthy())
    examination._progress = None  # the reference is asked again
    assert examination.report().ok


def test_logits_that_are_in_doubt_are_forgotten_too():
    given = []

    class Watched(Decoder):
        def forward(self, input_ids, lengths, state, **options):
            logits, after = super().forward(input_ids, lengths, state, **options)
            logits = logits + np.float32(4e-4)  # every position is over the plain limit
            given.append(weakref.ref(logits))
            return logits, after

    examination = Examination(
        reference(), facts=healthy().facts, rounding=lambda ids: np.full(len(ids), 1e-3, np.float32)
    )
    examination.run(Watched(Config()))
    gc.collect()
    assert len(given) > 100
    assert not [one for one in given if one() is not None]
    assert examination.report().ok
