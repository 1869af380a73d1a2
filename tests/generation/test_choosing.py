"""Tokens from the largest logits alone are those from all of them; and only rows that allow it are so chosen."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from generation_fakes import HashEngine

from lmopt.contracts import SupportsBest
from lmopt.errors import EngineError
from lmopt.generation import GenerationConfig, generate
from lmopt.generation.guarded import GuardedEngine

PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5]]


@dataclass
class BestEngine(HashEngine):
    """Hands out the largest logits by the letter of the contract: no more than it must."""

    vocab_size: int = 300
    most_best: int = 64
    asked: list[int] = field(default_factory=list)
    whole: int = 0
    coarse: bool = False
    """Whether logits are whole numbers, so that many tie."""

    def _logits(self, value):
        logits = super()._logits(value)
        return np.rint(logits) if self.coarse else logits

    def forward_best(self, input_ids, state, count):
        assert input_ids.shape[1] == 1
        self.asked.append(count)
        lines, state = self.forward(input_ids, np.ones(len(input_ids), np.int64), state)
        logits, ids = [], []
        for line in lines[:, 0]:
            kept = np.flatnonzero(line >= np.sort(line)[-count] - 1e-5)
            if np.isnan(line).any() or kept.size > self.most_best:
                self.whole += 1
                logits.append(line)
                ids.append(None)
            else:
                logits.append(line[kept])
                ids.append(kept)
        return logits, ids, state


def tokens(engine, config, **changes):
    return [[one.token_ids for one in row] for row in generate(engine, PROMPTS, config, **changes)]


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, 1),
        ({"do_sample": True, "top_k": 5}, 5),
        ({"do_sample": True, "top_k": 50, "top_p": 0.9, "temperature": 0.7}, 50),
        ({"do_sample": True, "top_k": 20, "min_p": 0.05, "typical_p": 0.8, "temperature": 1.9}, 20),
    ],
)
def test_the_same_tokens_from_the_best_alone(options, asked, coarse):
    config = GenerationConfig(max_new_tokens=24, seed=7, **options)
    engine = BestEngine(coarse=coarse)
    found = tokens(GuardedEngine(engine, "this engine"), config)
    assert set(engine.asked) == {asked}
    assert bool(engine.whole) == (coarse and asked == 50)
    without = BestEngine(coarse=coarse, most_best=0)
    assert found == tokens(without, config)
    assert not without.asked


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": True},
        {"repetition_penalty": 1.2},
        {"prompt_lookup_num_tokens": 3},
        {"suppress_tokens": (5,)},
        {"do_sample": True, "top_k": 0, "top_p": 0.9},
        {"do_sample": True, "top_k": 65},
        {"do_sample": True, "top_k": 5, "temperature": 1e-4},
    ],
)
def test_rows_that_need_whole_lines_get_them(options):
    config = GenerationConfig(max_new_tokens=6, seed=1, **options)
    engine = BestEngine()
    assert tokens(engine, config) == tokens(HashEngine(vocab_size=300), config)
    assert not engine.asked


def test_a_row_that_needs_whole_lines_gets_them_for_the_batch_as_long_as_it_runs():
    configs = [GenerationConfig(max_new_tokens=many) for many in (9, 9)]
    configs.append(GenerationConfig(max_new_tokens=4, logprobs=True))
    engine = BestEngine()
    assert tokens(engine, configs) == tokens(HashEngine(vocab_size=300), configs)
    assert engine.asked == [1] * 5  # a first token, three in company, five alone


def test_nan_is_an_error_of_its_row():
    class Broken(BestEngine):
        def _logits(self, value):
            logits = super()._logits(value)
            logits[3] = np.nan
            return logits

    engine = Broken()
    lines = engine.forward_best(np.array([[1]]), engine.begin(1), 1)
    assert lines[1] == [None]
    with pytest.raises(EngineError, match="NaN"):
        generate(Broken(), [[1]], GenerationConfig(max_new_tokens=3))


def test_who_has_no_best_is_asked_for_none():
    assert isinstance(GuardedEngine(HashEngine(), "x"), SupportsBest)
    assert GuardedEngine(HashEngine(), "x").most_best == 0
