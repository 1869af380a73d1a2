import gc
import time

import numpy as np
import pytest
from small_decoder import Config, Decoder

from lmopt.errors import ContextLengthError, InputError, ShapeError
from lmopt.evaluation import speed
from lmopt.evaluation.speed import (
    Figure,
    Lap,
    Speed,
    compare_speed,
    measure_speed,
    random_prompts,
    run_lap,
)


class Clock:
    """A clock that only an engine moves: figures are then exact."""

    def __init__(self, monkeypatch):
        self.now = 0
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.now)


class Timed(Decoder):
    """Takes 10 ms for a prompt token, and 2, 3, 4, ... ms a round for a new one."""

    def attach(self, clock, log, name):
        self.clock, self.log, self.name, self.round = clock, log, name, 1
        return self

    def forward(self, input_ids, lengths, state, *, last_only=False):
        assert last_only
        if not state.lengths[0]:
            self.round += 1
            self.log.append(self.name)
        self.clock.now += 10_000_000 * input_ids.shape[1] if not state.lengths[0] else self.round * 1_000_000
        return super().forward(input_ids, lengths, state, last_only=last_only)


@pytest.fixture
def timed(monkeypatch):
    clock, log = Clock(monkeypatch), []
    return lambda name="a": Timed(Config(layers=1)).attach(clock, log, name), log


def test_figures_are_those_of_the_clock(timed):
    make, log = timed
    got = measure_speed(make(), prompt_tokens=4, new_tokens=5, rounds=3, batch=2, warm_up=1)
    assert len(log) == 4
    # The first round took 2 ms a token and is not counted.
    assert got.token_p50_ms == got.token_p95_ms == Figure(4.0, 3.0, 5.0)
    assert got.decode_tokens_per_s.median == pytest.approx(2 / 0.004)
    assert got.decode_tokens_per_s.least == pytest.approx(2 / 0.005)
    assert got.decode_tokens_per_s.most == pytest.approx(2 / 0.003)
    assert got.first_token_ms == Figure(40.0, 40.0, 40.0)
    assert got.prefill_tokens_per_s.median == pytest.approx(2 * 4 / 0.040)
    assert (got.rounds, got.batch, got.prompt_tokens, got.new_tokens) == (3, 2, 4, 5)


def test_rates_of_rows_that_start_and_end_apart():
    # Row 0 has its first token at 10 ms and then one every 10 ms; row 1 starts at 30 ms, 5 ms a token.
    stamps = np.array([[10, 20, 30, 40], [30, 35, 40, 45]]) * 1_000_000
    got = Speed.of([Lap((3, 6), np.zeros((2, 4), np.int64), stamps)])
    assert got.first_token_ms.median == pytest.approx(30)
    assert got.prefill_tokens_per_s.median == pytest.approx(9 / 0.030)
    assert got.decode_tokens_per_s.median == pytest.approx(4 / 0.015)  # those after 30 ms
    assert got.total_tokens_per_s.median == pytest.approx(8 / 0.045)
    assert got.token_p50_ms.median == pytest.approx(7.5)
    assert (got.prompt_tokens, got.new_tokens, got.batch, got.rounds) == (6, 4, 2, 1)


def test_a_lap_gives_the_tokens_of_each_row_whatever_its_length():
    engine = Decoder(Config(layers=1))
    prompts = random_prompts(engine.facts, [7, 3, 5], seed=1)
    together = run_lap(engine, prompts, 6)
    assert together.prompt_lengths == (7, 3, 5)
    for row, prompt in enumerate(prompts):
        assert run_lap(engine, [prompt], 6).tokens.tolist() == [together.tokens[row].tolist()]


def test_laps_whose_arrays_do_not_belong_together():
    with pytest.raises(ShapeError, match="prompts, new tokens"):
        Lap((3,), np.zeros((2, 4), np.int64), np.zeros((2, 4), np.int64))
    with pytest.raises(ShapeError, match="two new tokens"):
        Lap((3,), np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64))


def test_engines_take_turns(timed):
    make, log = timed
    got = compare_speed({"a": make("a"), "b": make("b")}, prompt_tokens=2, new_tokens=2, rounds=2, warm_up=1)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert list(got) == ["a", "b"]


def test_progress_and_plain_values(timed):
    make, _ = timed
    calls = []
    got = measure_speed(
        make(), prompt_tokens=1, new_tokens=2, rounds=2, progress=lambda *call: calls.append(call)
    )
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert got.to_dict()["first_token_ms"] == {"median": 10.0, "least": 10.0, "most": 10.0}
    assert str(Figure(1.23456, 1.0, 200)) == "1.23 (1 .. 200)"


def test_a_clock_too_coarse_gives_numbers_still():
    class Instant(Decoder):
        pass

    got = measure_speed(Instant(Config(layers=1)), prompt_tokens=1, new_tokens=2, rounds=1)
    assert got.decode_tokens_per_s.median > 0
    assert speed.Figure.of([1.0, 5.0, 2.0]) == Figure(2.0, 1.0, 5.0)


def test_the_collector_is_left_as_it_was():
    assert gc.isenabled()
    measure_speed(Decoder(Config(layers=1)), prompt_tokens=1, new_tokens=2, rounds=1)
    assert gc.isenabled()

    class Failing(Decoder):
        def forward(self, *args, **options):
            assert not gc.isenabled()
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        measure_speed(Failing(Config(layers=1)), prompt_tokens=1, new_tokens=2)
    assert gc.isenabled()


@pytest.mark.parametrize("options", [{"new_tokens": 1}, {"rounds": 0}, {"prompt_tokens": 0}, {"batch": 0}])
def test_sizes_that_make_no_sense(options):
    with pytest.raises(InputError):
        measure_speed(Decoder(Config(layers=1)), **options)


def test_the_context_bounds_the_tokens():
    with pytest.raises(ContextLengthError, match="257"):
        measure_speed(Decoder(Config(layers=1)), prompt_tokens=200, new_tokens=57)
    with pytest.raises(InputError):
        compare_speed({})
