"""Widths under a budget."""

import itertools

import numpy as np
import pytest

from lmopt.compression import AWQ, GPTQ, Mixed, Quantize
from lmopt.compression.mixed import Candidate, choose_widths
from lmopt.errors import UnsupportedOptionError


def candidates(seed, count):
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        size = int(random.integers(100, 1000))
        scale = float(random.lognormal(0, 2))
        bits = (2, 3, 4, 8)
        made.append(
            Candidate((f"w{number}",), tuple(scale * 4.0**-b for b in bits), tuple(size * b for b in bits))
        )
    return made


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_near_the_best_of_all(seed):
    some = candidates(seed, 5)
    least, most = (sum(one.bytes[place] for one in some) for place in (0, -1))
    for budget in np.linspace(least, most, 5).astype(int):
        chosen = choose_widths(some, int(budget))
        assert sum(one.bytes[c] for one, c in zip(some, chosen, strict=True)) <= budget
        cost = sum(one.costs[c] for one, c in zip(some, chosen, strict=True))
        best = min(
            sum(one.costs[c] for one, c in zip(some, every, strict=True))
            for every in itertools.product(range(4), repeat=5)
            if sum(one.bytes[c] for one, c in zip(some, every, strict=True)) <= budget
        )
        worst = sum(one.costs[0] for one in some)
        assert cost - best <= 0.1 * (worst - best)


def test_everything_is_spent_where_there_is_enough():
    some = candidates(0, 4)
    assert choose_widths(some, 10**9) == [3, 3, 3, 3]


def test_a_step_that_costs_more_is_not_taken():
    odd = Candidate(("w",), (1.0, 1.5, 0.5), (10, 20, 30))
    assert choose_widths([odd], 20) == [0]
    assert choose_widths([odd], 30) == [2]


def test_too_small_a_budget_says_what_to_do():
    with pytest.raises(UnsupportedOptionError, match="average_bits"):
        choose_widths(candidates(0, 3), 1)


def test_the_step_with_forms():
    mixed = Mixed(GPTQ(group_size=64, overrides={"*.head": None}), average_bits=4.5)
    step = mixed.with_forms({"a.up": {"bits": 3}, "a.down": {"bits": 8, "group_size": 32}})
    assert isinstance(step, GPTQ)
    assert step.form("a.up", "linear").bits == 3
    assert step.form("a.down", "linear").bits == 8
    assert step.form("a.down", "linear").group_size == 32
    assert step.form("b.up", "linear").bits == 4
    assert step.form("a.head", "linear") is None


@pytest.mark.parametrize(
    "options",
    [
        {"average_bits": 3},
        {"average_bits": 17.0},
        {"choices": (4,)},
        {"choices": (8, 4)},
        {"choices": (1, 4)},
        {"group_sizes": (12,)},
        {"tokens": 3},
        {"quantizer": "gptq"},
        {"quantizer": AWQ(fold_only=True)},
    ],
)
def test_fields_are_checked(options):
    with pytest.raises(UnsupportedOptionError):
        Mixed(**{"quantizer": Quantize(), **options})


def test_options_rise_in_bytes_and_hold_every_pair():
    found = Mixed(Quantize(), average_bits=4.5, choices=(3, 4), group_sizes=(16, 64)).options()
    assert found == [
        {"bits": 3, "group_size": 64},
        {"bits": 3, "group_size": 16},
        {"bits": 4, "group_size": 64},
        {"bits": 4, "group_size": 16},
    ]
    assert [one["group_size"] for one in Mixed(Quantize(group_size=64)).options()] == [64] * 5


def test_a_better_form_of_equal_bytes_is_taken():
    assert choose_widths([Candidate(("a",), (2.0, 1.0), (8, 8))], 8) == [1]
