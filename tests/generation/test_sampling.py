"""Narrowing equals transformers' warpers, and drawing follows the probabilities."""

import numpy as np
import pytest
from generation_fakes import ConstantEngine

from lmopt.errors import EngineError, UnsupportedOptionError
from lmopt.generation import GenerationConfig, generate
from lmopt.generation.randomness import philox, uniform
from lmopt.generation.sampling import (
    Choice,
    _lightest,
    _nearest,
    draw,
    greedy,
    largest,
    largest_sums,
    log_normalizer,
    narrow,
)

WARPERS = [
    {"top_k": 0},
    {"top_k": 0, "temperature": 0.3},
    {"top_k": 0, "temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 50},
    {"top_k": 5000},
    {"top_k": 0, "top_p": 0.9},
    {"top_k": 0, "top_p": 0.999},
    {"top_k": 0, "top_p": 0.2},
    {"top_k": 0, "top_p": 1e-7},
    {"top_k": 0, "top_p": 0.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 0, "min_p": 0.05},
    {"top_k": 0, "min_p": 1.0},
    {"top_k": 0, "min_p": 0.0},
    {"top_k": 0, "typical_p": 0.3},
    {"top_k": 0, "typical_p": 0.95},
    {"top_k": 30, "typical_p": 0.5},
    {"temperature": 0.7, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9},
    {"temperature": 1.4, "top_k": 0, "top_p": 0.9, "min_p": 0.02},
]


def their_probabilities(scores, options):
    """Probabilities after the warpers that transformers builds for these options."""
    import torch
    from generation_hf import tiny_model
    from transformers import GenerationConfig as TheirConfig

    config = TheirConfig(do_sample=True, num_beams=1, **options)
    config._eos_token_tensor = None
    processors = tiny_model("gpt2")._get_logits_processor(config, input_ids_seq_length=1)
    assert any(True for _ in processors) or set(options) == {"top_k"}
    warped = processors(torch.zeros(1, 1, dtype=torch.long), torch.tensor(scores)[None])
    return warped[0].softmax(-1).numpy()


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("options", WARPERS, ids=repr)
def test_probabilities_equal_transformers(options, spread):
    if spread == 0.01 and "typical_p" in options:
        pytest.skip("all tokens are within rounding of the border there, in transformers too")
    for seed, size in [(0, 11), (1, 1000), (2, 4099)]:
        scores = (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)
        scores[::7] = -np.inf  # as bans leave them
        config = GenerationConfig(do_sample=True, **options)
        found = narrow(scores.copy(), config).probabilities(size)
        theirs = their_probabilities(scores, options)
        assert np.abs(found - theirs).max() <= 1e-6
        assert found.sum() == pytest.approx(1.0, abs=1e-5)


def test_equal_scores_at_the_border():
    """Of equal scores, top-k keeps all and top-p as many as it needs, as transformers does."""
    scores = np.zeros(10, np.float32)
    assert narrow(scores, GenerationConfig(do_sample=True, top_k=3)).scores.size == 10
    kept = narrow(scores, GenerationConfig(do_sample=True, top_k=0, top_p=0.25))
    assert kept.scores.size == (their_probabilities(scores, {"top_k": 0, "top_p": 0.25}) > 0).sum() == 3


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"temperature": 1.5, "top_k": 0, "top_p": 0.9}, {"top_k": 5}]
)
def test_draws_follow_the_probabilities(options):
    """Chi-square of 20,000 draws of the whole loop, 1,000 sequences of 20 tokens."""
    logits = np.random.default_rng(3).standard_normal(30).astype(np.float32)
    engine = ConstantEngine(logits=logits)
    config = GenerationConfig(
        do_sample=True, seed=11, num_return_sequences=1000, max_new_tokens=20, **options
    )
    (found,) = generate(engine, [[1, 2]], config)
    counts = np.bincount([token for one in found for token in one.token_ids], minlength=30)
    assert counts.sum() == 20_000
    expected = their_probabilities(logits, options).astype(np.float64) * 20_000
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert possible.sum() >= 5
    statistic = (((counts - expected) ** 2)[possible] / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)  # about one in 30,000; the seed is fixed
    assert statistic > freedom - 4 * np.sqrt(2 * freedom)


def test_draw_inverts_the_cumulative_distribution():
    choice = Choice(np.array([4, 9, 12]), np.log(np.array([0.25, 0.5, 0.25], np.float32)))
    assert [draw(choice, u) for u in (0.0, 0.2499, 0.2501, 0.7499, 0.7501)] == [4, 4, 9, 9, 12]


def test_draw_never_gives_what_is_impossible():
    scores = np.full(6, -np.inf, np.float32)
    scores[[2, 3]] = 0.0
    assert {draw(Choice(None, scores), u) for u in (0.0, 0.25, 0.5, 0.75, np.nextafter(1.0, 0.0))} == {2, 3}
    assert draw(Choice(None, scores), 0.0) == 2
    assert draw(Choice(None, scores), 1.0) == 3  # what rounding could make of a number below 1


def test_largest_is_a_stable_sort():
    generator = np.random.default_rng(0)
    for size in (3, 64, 200, 5000):
        values = generator.integers(0, 40, size).astype(np.float32)
        values[generator.integers(0, size, size // 5)] = -np.inf
        for count in (1, 2, 17, size, size + 3):
            expected = np.argsort(-values, kind="stable")[:count]
            assert largest(values, count).tolist() == expected.tolist()


@pytest.mark.parametrize("vocab_size", [3, 63, 64, 200, 5000, 6413])
def test_largest_sums_are_those_of_all_sums(vocab_size):
    generator = np.random.default_rng(vocab_size)
    for rows in (1, 2, 5):
        # Few different values: many sums are equal.
        scores = generator.integers(0, 40, (rows, vocab_size)).astype(np.float32)
        scores[generator.random(scores.shape) < 0.2] = -np.inf
        less, more = generator.integers(0, 3, (2, rows)).astype(np.float32) * np.float32(1.1)
        sums = ((scores - less[:, None]) + more[:, None]).ravel()
        for count in (1, 2, 8, 40, scores.size, scores.size + 3):
            expected = np.argsort(-sums, kind="stable")[:count]
            row, column, values = largest_sums(scores, less, more, count)
            assert (row * vocab_size + column).tolist() == expected.tolist()
            assert values.tolist() == sums[expected].tolist()
        for place in (0, vocab_size // 2, vocab_size - 1):
            broken = scores.copy()
            broken[-1, place] = np.nan
            with pytest.raises(EngineError, match="NaN"):
                largest_sums(broken, less, more, 4)


@pytest.mark.parametrize(
    ("mean", "spread"), [(0, 1), (0, 30), (70, 5), (200, 3), (-90, 3), (-4000, 10), (0, 1000)]
)
def test_normalizer_is_that_of_float64(mean, spread):
    scores = (np.random.default_rng(0).normal(size=50257) * spread + mean).astype(np.float32)
    exact = np.logaddexp.reduce(scores.astype(np.float64))
    assert log_normalizer(scores) == pytest.approx(exact, rel=2e-7, abs=2e-6)


def test_greedy_takes_the_lowest_of_equals_and_refuses_nan():
    rows = np.zeros((2, 5), np.float32)
    rows[1, 3] = 1.0
    assert greedy(rows) == [0, 3]
    rows[1, 4] = np.nan
    with pytest.raises(EngineError, match="NaN"):
        greedy(rows)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"repetition_penalty": 1.1}, {"num_beams": 2}])
def test_nan_is_an_error_in_every_mode(options):
    logits = np.zeros(8, np.float32)
    logits[5] = np.nan
    with pytest.raises(EngineError, match="NaN"):
        generate(ConstantEngine(logits=logits), [[1]], GenerationConfig(**options))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_all_banned_is_an_error(options):
    config = GenerationConfig(suppress_tokens=range(4), **options)
    with pytest.raises(UnsupportedOptionError, match="no token to choose"):
        generate(ConstantEngine(logits=np.zeros(4, np.float32)), [[1]], config)


def test_philox_is_that_of_numpy():
    for key, counter in [((0, 0), 1), ((1, 2), 3), ((2**64 - 1, 7), 2**64 - 1), ((12345, 0), 4096)]:
        # NumPy steps the counter before it computes.
        words = np.array([counter - 1, 0, 0, 0], np.uint64)
        theirs = np.random.Philox(key=np.array(key, np.uint64), counter=words).random_raw()
        assert philox(key, counter) == int(theirs)


def test_uniform_is_uniform_in_each_argument():
    for numbers in (
        [uniform(n, 0, 0) for n in range(4000)],
        [uniform(1, n, 0) for n in range(4000)],
        [uniform(1, 0, n) for n in range(4000)],
    ):
        assert 0.0 <= min(numbers) < max(numbers) < 1.0
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 50  # 19 degrees of freedom
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.06


@pytest.mark.parametrize("spread", [0.3, 2.0, 4.0, 10.0])
def test_a_large_vocabulary_takes_no_short_cut_that_shows(spread):
    """The quick ways for large vocabularies, against plain sorts and running sums."""
    scores = (np.random.default_rng(1).standard_normal(49152) * spread).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    weights = np.exp((scores - scores.max()).astype(np.float64))
    for top_p in (0.1, 0.5, 0.9, 0.99, 0.9999):
        running = weights[order].cumsum()
        count = int((running < top_p * running[-1]).sum()) + 1
        kept = narrow(scores, GenerationConfig(do_sample=True, top_k=0, top_p=top_p))
        assert kept.ids.tolist() == sorted(order[:count].tolist())
    for top_k in (1, 50, 192, 193, 5000):
        kept = narrow(scores, GenerationConfig(do_sample=True, top_k=top_k))
        assert kept.ids.tolist() == sorted(order[:top_k].tolist())
        assert largest(scores, top_k).tolist() == order[:top_k].tolist()
    running = weights.cumsum() / weights.sum()
    for number in np.random.default_rng(2).random(300):
        token = draw(Choice(None, scores), float(number))
        below = running[token - 1] if token else 0.0
        assert below - 1e-6 <= number <= running[token] + 1e-6


@pytest.mark.parametrize("size", [16_640, 49_152, 50_257])
@pytest.mark.parametrize("kind", ["zipf", "flat", "sharp", "equal", "banned"])
def test_short_cuts_over_a_vocabulary_change_nothing(kind, size):
    """What is kept and drawn is what sorting and summing everything gives."""
    generator = np.random.default_rng(size)
    scores = {
        "zipf": -1.3 * np.log(generator.permutation(size) + 1.0) + generator.normal(size=size) / 2,
        "flat": generator.normal(size=size) * 0.01,
        "sharp": generator.normal(size=size) * 6.0,
        "equal": generator.integers(0, 4, size).astype(float),
        "banned": np.where(generator.random(size) < 0.4, -np.inf, generator.normal(size=size) * 2),
    }[kind].astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    weights = np.exp(scores.astype(np.float64) - scores.max())
    share = weights[order].cumsum() / weights.sum()
    for top_p in (0.0, 0.3, 0.9, 0.999):
        kept = narrow(scores, GenerationConfig(do_sample=True, top_k=0, top_p=top_p)).ids
        count = int(share.searchsorted(top_p)) + 1
        assert abs(kept.size - count) <= 1 + count * 1e-5  # weights are float32
        assert (np.diff(kept) > 0).all()
        assert np.isin(kept, order[: count + 2 + count // 50_000]).all() or kind == "equal"
        assert scores[kept].min() >= scores[order[count - 1]] - 1e-6
    for top_k in (1, 50, 191, 5000):
        kept = narrow(scores, GenerationConfig(do_sample=True, top_k=top_k)).ids
        assert np.array_equal(kept, np.flatnonzero(scores >= np.sort(scores)[size - top_k]))
    edges = weights.cumsum() / weights.sum()
    for number in generator.random(50):
        token = draw(Choice(None, scores), number)
        assert (edges[token - 1] if token else 0.0) - 1e-6 <= number <= edges[token] + 1e-6
        assert weights[token] > 0


@pytest.mark.parametrize("ties", [False, True])
def test_sorting_a_few_keeps_what_filling_bins_keeps(ties):
    """Both find the border of top-p, among equal scores too."""
    generator = np.random.default_rng(7)
    for size in (1, 2, 50, 700, 2048):
        for _ in range(40):
            keys = np.abs(generator.normal(size=size) * 5).astype(np.float32)
            if ties:
                keys = np.round(keys)
            keys -= keys.min()
            keys[generator.random(size) < 0.1] = np.inf  # banned
            keys[generator.integers(size)] = 0.0
            weights = np.exp(-keys)
            total = float(weights.sum(dtype=np.float64))
            for top_p in (0.0, 0.3, 0.9, 0.999):
                found = _nearest(keys, weights, top_p * total)
                assert found.tolist() == _lightest(keys, weights, top_p * total).tolist()
