"""Reliability row 20: seeded defects must be caught by the default gate."""

import numpy as np
import pytest
from defects import CONFIG, DEFECTS, healthy
from small_decoder import Config, Decoder, oracle

from lmopt.errors import ParityError
from lmopt.evaluation.parity import measure, require

REFERENCE = oracle(CONFIG, healthy().weights)

# The case that must see the defect; another may see it too.
SEEN_BY = {
    "stale cache": {"decode", "several", "greedy"},
    "positions count padding": {"batch-right", "batch-left"},
    "wrong past length": {"decode", "several", "greedy"},
    "ignored padding": {"batch-right", "batch-left"},
    "wrong row in select": {"select/join"},
    "select forgets values": {"select/join"},
    "join reversed": {"select/join"},
    "last_only takes last column": {"greedy", "select/join"},
    "truncated context": {"prefill", "several"},
    "baked length": {"prefill", "decode"},
    "several not causal": {"several"},
    "batched keys in bfloat16": {"batch-right", "batch-left", "greedy"},
    "left padding not undone": {"batch-left"},
    "one NaN": {"decode", "greedy"},
    "last_only on the left": {"select/join"},
    "cached pieces taken whole": {"batch-right", "batch-left"},
    "guessed padding": {"batch-right", "batch-left"},
}


def test_there_are_at_least_twenty_defects():
    assert len(DEFECTS) >= 20


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_engine_passes(seed):
    report = measure(REFERENCE, healthy(), seed=seed)
    require(report, what="the healthy decoder")
    assert report.worst.severity < 0.5, report.lines()


@pytest.mark.parametrize("name", DEFECTS)
def test_the_gate_catches(name):
    report = measure(REFERENCE, DEFECTS[name]())
    failed = {case.case for case in report.cases if not case.ok}
    assert not report.ok
    assert (
        SEEN_BY.get(name, {"prefill", "decode", "several", "batch-right", "batch-left", "greedy"}) <= failed
    )
    with pytest.raises(ParityError):
        require(report, what=name)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_gate_catches_in_a_short_context(name):
    config = Config(context=32)
    engine = DEFECTS[name]()
    engine = type(engine)(config, engine.weights)
    report = measure(oracle(config, healthy().weights), engine)
    # A context of 32 is never cut at 64 nor reaches the 100th position.
    assert report.ok == (name in {"truncated context", "baked length"})


def test_text_prompts_are_used_and_catch_what_random_ids_would_not():
    class OneWrongEmbedding(Decoder):
        def embed(self, ids):
            x = super().embed(ids)
            return np.where((ids == 2)[..., None], 1.1 * x, x)

    def prefill_passes(prompts):
        report = measure(REFERENCE, OneWrongEmbedding(CONFIG), prompts=prompts)
        return next(case.ok for case in report.cases if case.case == "prefill")

    assert prefill_passes(None)  # random ids stay away from where special ids lie
    assert not prefill_passes([[50, 2, 61, 33], [40, 41]])
