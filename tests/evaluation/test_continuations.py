"""Scores of continuations: right, whatever is read together, and shared contexts are read once."""

import sys
from pathlib import Path

import numpy as np
import pytest

from lmopt.errors import ContextLengthError, EmptyPromptError, TokenIdError
from lmopt.evaluation.continuations import score_continuations

sys.path.insert(0, str(Path(__file__).parents[1] / "generation"))
from generation_fakes import HashEngine

PAIRS = [
    ([1, 2, 3], [4]),
    ([1, 2, 3], [5, 6, 7, 8]),
    ([1, 2, 3], [4, 9]),
    ([7], [8, 9, 10, 11, 12, 13, 14]),
    ([2] * 11, [3, 4]),
    ([1, 2], [3, 4]),
    ([1, 2, 3], [4]),
]


def reference(context, continuation):
    """Log-probabilities by one forward of everything, in float64, and the tokens that greedy decoding writes."""
    engine = HashEngine()
    row = np.array([[*context, *continuation]])
    logits, _ = engine.forward(row, np.array([row.size]), engine.begin(1))
    places = logits[0, len(context) - 1 : -1].astype(np.float64)
    logs = places - np.log(np.exp(places).sum(-1, keepdims=True))
    return logs[np.arange(len(continuation)), continuation], places.argmax(-1).tolist()


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "logit_bytes", "batch_tokens"),
    [(8, 2**20, 4096), (3, 2**20, 4096), (1, 2**20, 4096), (8, 1, 4096), (8, 2**20, 4)],
)
def test_equals_the_reference(ragged, batch_size, logit_bytes, batch_tokens):
    engine, told = HashEngine(ragged=ragged), []
    options = {"batch_size": batch_size, "logit_bytes": logit_bytes, "batch_tokens": batch_tokens}
    found = score_continuations(engine, PAIRS, **options, progress=lambda *one: told.append(one))
    for (context, continuation), score in zip(PAIRS, found, strict=True):
        logs, best = reference(context, continuation)
        assert score.logprobs.dtype == np.float32
        assert np.allclose(score.logprobs, logs, atol=1e-6)
        assert score.total == pytest.approx(logs.sum(), abs=1e-5)
        assert score.greedy == (best == continuation)
    assert max(batch for batch, _ in engine.calls) <= batch_size
    assert told[-1] == (len(PAIRS), len(PAIRS))


def test_what_greedy_decoding_writes_is_greedy_and_nothing_else():
    context, written = [3, 1, 4], []
    for _ in range(4):
        written.append(reference(context, [*written, 0])[1][-1])
    others = [[*written[:place], (written[place] + 1) % 50, *written[place + 1 :]] for place in range(4)]
    found = score_continuations(HashEngine(), [(context, one) for one in (written, *others)])
    assert [one.greedy for one in found] == [True, False, False, False, False]


def test_a_shared_context_is_read_once():
    engine = HashEngine()
    context = list(range(30))
    score_continuations(engine, [(context, [n, n + 1]) for n in range(4)])
    assert sum(batch * width for batch, width in engine.calls) == 30 + 4
    single = HashEngine()
    score_continuations(single, [(context, [n]) for n in range(4)])
    assert single.calls == [(1, 30)], "continuations of one token need no further call"


def test_the_last_token_need_not_fit_the_context():
    engine = HashEngine(context_length=8)
    (found,) = score_continuations(engine, [([1] * 6, [2, 3, 4])])
    assert found.logprobs.size == 3
    with pytest.raises(ContextLengthError, match="context 0 has 7 tokens"):
        score_continuations(engine, [([1] * 7, [2, 3, 4])])


def test_bad_pairs():
    assert score_continuations(HashEngine(), []) == []
    with pytest.raises(EmptyPromptError, match="context 1"):
        score_continuations(HashEngine(), [([1], [2]), ([], [2])])
    with pytest.raises(EmptyPromptError, match="continuation 0"):
        score_continuations(HashEngine(), [([1], [])])
    with pytest.raises(TokenIdError, match="continuation 0 holds id 50"):
        score_continuations(HashEngine(), [([1], [50])])
