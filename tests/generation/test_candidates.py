"""The best continuations, found by looking at few tokens, are those that looking at all finds."""

import numpy as np
import pytest

from lmopt.errors import EngineError
from lmopt.generation.candidates import best_of_logits, best_of_scores
from lmopt.generation.config import GenerationConfig
from lmopt.generation.history import History
from lmopt.generation.processors import build_processors, only_banned
from lmopt.generation.sampling import log_probabilities
from lmopt.types import FloatArray, IntArray

NOTHING = np.zeros(0, np.int64)


def by_all(logits: FloatArray, running: FloatArray, count: int, banned: list[IntArray]):
    logprobs = log_probabilities(logits)
    scores = logprobs.copy()
    for line, ids in zip(scores, banned, strict=True):
        line[ids] = -np.inf
    return best_of_scores(scores, logprobs, running, count)


@pytest.mark.parametrize("kind", ["spread", "ties", "flat", "peaked", "far behind"])
@pytest.mark.parametrize("vocab_size", [97, 5_000, 32_000])
def test_few_tokens_say_what_all_say(vocab_size: int, kind: str) -> None:
    rng = np.random.default_rng(len(kind) + vocab_size)
    for beams in (2, 4, 5):
        count = 2 * beams
        logits = rng.normal(size=(beams, vocab_size)).astype(np.float32)
        running = -10 * rng.random(beams, np.float32)
        if kind == "ties":
            logits = np.round(logits * 2)
            running = np.round(running)
        elif kind == "flat":  # sums with scores of this size round differences away
            logits *= np.float32(1e-6)
            running -= 1000
        elif kind == "peaked":
            logits *= 20
        elif kind == "far behind":  # as at the start, where all beams are the same
            logits[:] = logits[0]
            running[1:] = -1e9
        banned = [rng.integers(0, vocab_size, int(size)) for size in rng.integers(0, 9, beams)]
        # Of the likeliest, too.
        banned[0] = np.concatenate([banned[0], np.argsort(-logits[0])[:3]])
        expected = by_all(logits, running, count, banned)
        found = best_of_logits(logits, running, count, banned)
        if vocab_size < 1_000:  # looking at all is as quick
            assert found is None
            continue
        assert found is not None
        for name in ("parents", "ids", "scores", "logprobs"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


def test_where_much_is_banned_all_is_looked_at() -> None:
    logits = np.zeros((2, 5_000), np.float32)
    running = np.zeros(2, np.float32)
    assert best_of_logits(logits, running, 4, [np.arange(4_000), NOTHING]) is None
    # Of equals the first are taken, and a ban may leave too few of those that were looked at.
    found = best_of_logits(logits, running, 4, [np.arange(15), NOTHING])
    assert found is not None
    assert (found.parents.tolist(), found.ids.tolist()) == ([0] * 4, [15, 16, 17, 18])


@pytest.mark.parametrize("at", [7, 4_999])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_no_answer(value: float, at: int) -> None:
    logits = np.zeros((2, 5_000), np.float32)
    logits[1, at] = value
    with np.errstate(invalid="ignore"), pytest.raises(EngineError, match="NaN"):
        best_of_logits(logits, np.zeros(2, np.float32), 4, [NOTHING, NOTHING])


def test_bans_say_what_they_do_to_scores() -> None:
    config = GenerationConfig(
        no_repeat_ngram_size=2,
        bad_words_ids=[[3], [5, 6]],
        min_new_tokens=3,
        suppress_tokens=[8],
        begin_suppress_tokens=[9],
        eos_token_id=1,
    )
    processors = build_processors(config, 20)
    rng = np.random.default_rng(0)
    for _ in range(200):
        history = History(rng.integers(4, 8, 12), int(rng.integers(4, 12)), 4)
        scores = np.zeros(20, np.float32)
        for one in processors:
            one(scores, history)
        banned = only_banned(processors, history)
        assert banned is not None
        assert set(banned.tolist()) == set(np.flatnonzero(scores == -np.inf).tolist())


def test_what_does_more_than_ban_is_told() -> None:
    history = History(np.zeros(8, np.int64), 5, 2)
    config = GenerationConfig(forced_eos_token_id=1, suppress_tokens=[4])
    processors = build_processors(config, 20)
    found = only_banned(processors, history)
    assert found is not None
    assert found.tolist() == [4]
    history.length = 7  # the next token is the last one: it is forced
    assert only_banned(processors, history) is None
    penal = build_processors(GenerationConfig(repetition_penalty=1.2), 20)
    assert only_banned(penal, history) is None
