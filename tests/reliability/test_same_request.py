"""Row 22: the same request gives the same tokens, however it is served."""

import dataclasses

import numpy as np
import pytest
from seeded_requests import is_tie, make

from lmopt.contracts import SupportsRewind
from lmopt.generation import Limits, PrefixStore, Workspace, generate
from lmopt.runtime import Runtime

pytestmark = pytest.mark.slow


class LeftPadded:
    """The same engine, with its padding on the left."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def begin(self, batch, *, capacity=None, padding_side="right"):
        return self._engine.begin(batch, capacity=capacity, padding_side="left")


@pytest.fixture(scope="session")
def served(full_sweep):
    return make(200 if full_sweep else 40)


@pytest.fixture(scope="session")
def alone(runtime, served):
    """What each request gives alone."""
    return [runtime.generate(prompt, config) for prompt, config in served]


def answers(engine, served, workspace=None):
    prompts, configs = zip(*served, strict=True)
    return [found[0] for found in generate(engine, prompts, configs, workspace=workspace)]


def same(found, expected):
    return [n for n, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]


@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_in_a_batch(runtime, served, alone, size):
    found = []
    for start in range(0, len(served), size):
        found += answers(runtime.engine, served[start : start + size])
    assert not same(found, alone)


def test_permuted(runtime, served, alone):
    order = np.random.default_rng(5).permutation(len(served))
    found = answers(runtime.engine, [served[n] for n in order])
    assert not same(found, [alone[n] for n in order])


def test_padded_on_the_left(runtime, served, alone):
    assert not same(answers(LeftPadded(runtime.engine), served), alone)


@pytest.mark.parametrize("limits", [(1, 512), (3, 16), (8, 24), (5, 1)], ids=repr)
def test_arriving_while_others_run(runtime, served, alone, limits):
    workspace = Workspace(Limits(*limits))
    assert not same(answers(runtime.engine, served, workspace), alone)


def test_with_two_threads(opener, served, alone):
    with opener(threads=2) as other:
        found = [other.generate(prompt, config) for prompt, config in served]
    assert not same(found, alone)


def test_with_kept_prefixes_and_with_prompt_lookup(runtime, served, alone):
    engine = runtime.engine
    if not (isinstance(engine, SupportsRewind) and engine.rewinds):
        pytest.skip(f"the engine {runtime.backend} does not rewind")
    keeping = Workspace(Limits(4, 24), PrefixStore(10_000))
    for _ in range(2):
        found = [answers(engine, [one], keeping)[0] for one in served]
        assert not same(found, alone)
    assert keeping.prefixes.report().hits >= sum(len(prompt) > 16 for prompt, _ in served)
    eager = [(prompt, dataclasses.replace(config, prompt_lookup_num_tokens=6)) for prompt, config in served]
    assert not same(answers(engine, eager, Workspace(Limits(4, 24))), alone)


def test_on_another_engine(tiny, runtime, served, alone):
    """Logits of two engines differ by rounding: so may a token where that decides."""
    other = "torch" if runtime.backend == "onnxruntime" else "onnxruntime"
    with Runtime(tiny, backend=other, threads=1) as theirs:
        equal = total = 0
        for (prompt, config), expected in zip(served, alone, strict=True):
            found = theirs.generate(prompt, config)
            total += len(expected.token_ids)
            pairs = zip(found.token_ids, expected.token_ids, strict=False)
            equal += sum(a == b for a, b in pairs)
            assert found == expected or is_tie(runtime, prompt, config, found.token_ids, expected.token_ids)
    assert equal >= 0.99 * total
