"""Rows that enter a batch while it runs: their tokens are their own, and their memory goes with them."""

import threading

import numpy as np
import pytest
from generation_fakes import HashEngine, RewindEngine

from lmopt.generation import GenerationConfig, Limits, PrefixStore, Workspace, generate
from lmopt.generation.batching import steps
from lmopt.generation.interruption import Interruption
from lmopt.generation.rows import prepare

MODES = [
    {},
    {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    {"repetition_penalty": 1.3, "logprobs": 2, "prompt_lookup_num_tokens": 4},
]


class Plan:
    """Requests that come before the calls of given numbers; `waited` counts how often nothing ran."""

    def __init__(self, requests):
        self.requests = list(requests)
        self.calls = self.waited = 0

    def take(self, *, wait):
        self.calls += 1
        self.waited += wait
        if not self.requests:
            return None
        if wait:
            return [self.requests.pop(0)[1]]
        due = [rows for at, rows in self.requests if at <= self.calls]
        self.requests = [one for one in self.requests if one[0] > self.calls]
        return due


def rows_of(engine, prompts, config):
    return [prepare(engine, [prompt], config, None) for prompt in prompts]


def run(engine, plan, workspace=None):
    for _ in steps(engine, [], workspace or Workspace(), Interruption(None, ()), plan):
        pass


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("limits", [(32, 512), (2, 7), (5, 16)], ids=repr)
@pytest.mark.parametrize("mode", MODES, ids=repr)
def test_rows_that_come_later_are_as_if_alone(mode, limits, ragged):
    config = GenerationConfig(max_new_tokens=9, eos_token_id=[3, 30, 31], **mode)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(4, 50, generator.integers(1, 24)).tolist() for _ in range(12)]
    alone = [generate(HashEngine(ragged=ragged), [prompt], config)[0] for prompt in prompts]
    engine = HashEngine(ragged=ragged)
    requests = rows_of(engine, prompts, config)
    plan = Plan(zip([1, 1, 2, 3, 5, 8, 9, 9, 14, 30, 31, 500], requests, strict=True))
    run(engine, plan, Workspace(Limits(*limits)))
    assert [[row.result(None) for row in rows] for rows in requests] == alone
    assert not ragged or max(batch for batch, _ in engine.calls) > 1
    assert max(batch for batch, _ in engine.calls) <= limits[0]
    assert plan.waited >= 2  # at the start, and before the last one


def test_rows_leave_with_their_states_and_cancelled_ones_at_once():
    engine = RewindEngine()
    requests = rows_of(engine, [[1, 2, 3], [4, 5], [6]], GenerationConfig(max_new_tokens=40))
    flag = threading.Event()
    requests[1][0].cancel = flag
    seen = []

    class Watch(Plan):
        def take(self, *, wait):
            if self.calls == 10:
                flag.set()
            seen.append((wait, len(engine.alive), engine.calls[-1][0] if engine.calls else 0))
            return super().take(wait=wait)

    run(engine, Watch([(1, requests[0]), (1, requests[1]), (400, requests[2])]))
    assert [rows[0].finish_reason for rows in requests] == ["length", "cancelled", "length"]
    assert len(requests[1][0].history.new) < 12
    # While nothing runs nothing is held.
    assert [alive for wait, alive, _ in seen if wait] == [0, 0]
    assert not engine.alive


def test_prefixes_of_rows_that_end_alone_are_kept():
    engine = RewindEngine()
    workspace = Workspace(prefixes=PrefixStore(1000))
    prompt = list(range(4, 44))
    config = GenerationConfig(max_new_tokens=4)
    alone = generate(RewindEngine(), [prompt], config)[0]
    requests = rows_of(engine, [prompt, prompt], config)
    run(engine, Plan([(1, requests[0]), (400, requests[1])]), workspace)
    assert [[row.result(None) for row in rows] for rows in requests] == [alone, alone]
    assert workspace.prefixes.report().reused >= 39
