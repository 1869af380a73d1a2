import tracemalloc

import numpy as np
import pytest

from lmopt.errors import ShapeError, UnsupportedOptionError
from lmopt.evaluation.divergence import DifferenceMeter, compare_logits, log_softmax
from lmopt.evaluation.tolerances import TOLERANCES, Tolerance, tolerance_for


@pytest.fixture
def random():
    return np.random.default_rng(0)


def logits(random, *shape, scale=5.0):
    return (scale * random.standard_normal(shape)).astype(np.float32)


def slow_kl(a, b):
    a, b = a.astype(np.longdouble), b.astype(np.longdouble)
    p, q = np.exp(a - a.max()), np.exp(b - b.max())
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


def test_against_the_plain_formulas(random):
    ref, cand = logits(random, 3, 7, 50), logits(random, 3, 7, 50)
    got = compare_logits(ref, cand, Tolerance("x", 1, 1, 1, atol=0.5, rtol=0.25))
    r, c = ref.reshape(-1, 50).astype(float), cand.reshape(-1, 50).astype(float)
    kl = np.array([slow_kl(a, b) for a, b in zip(r, c, strict=True)])
    error = np.abs(r - c)
    assert got.positions == 21
    assert got.max_abs == error.max()
    assert got.mean_abs == pytest.approx(error.mean(), rel=1e-12)
    assert got.max_ratio == pytest.approx((error / (0.5 + 0.25 * np.abs(r))).max(), rel=1e-12)
    assert got.kl_mean == pytest.approx(kl.mean(), rel=1e-10)
    assert got.kl_p50 == pytest.approx(np.median(kl), rel=1e-10)
    assert got.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-10)
    assert got.kl_max == pytest.approx(kl.max(), rel=1e-10)
    assert got.top1_raw == pytest.approx((r.argmax(1) == c.argmax(1)).mean())
    cosine = (r * c).sum(1) / np.linalg.norm(r, axis=1) / np.linalg.norm(c, axis=1)
    assert got.cosine_min == pytest.approx(cosine.min(), rel=1e-12)


def test_small_kl_is_exact_far_below_the_gate(random):
    ref = logits(random, 40, 3000)
    cand = (ref.astype(float) * (1 + 1e-6 * random.standard_normal(ref.shape))).astype(np.float32)
    got = compare_logits(ref, cand).kl_mean
    exact = np.mean([slow_kl(a, b) for a, b in zip(ref, cand, strict=True)])
    assert 0 < exact < 1e-9
    assert got == pytest.approx(exact, abs=1e-14)


def test_equal_logits_differ_in_nothing(random):
    ref = logits(random, 4, 100)
    got = compare_logits(ref, ref.copy())
    assert (got.max_abs, got.max_ratio, got.top1, got.top1_raw) == (0, 0, 1, 1)
    assert got.kl_max < 1e-14


def test_a_constant_shift_has_no_kl_but_an_error(random):
    got = compare_logits(ref := logits(random, 4, 100), ref + np.float32(2))
    assert got.kl_max < 1e-12
    assert got.max_abs == pytest.approx(2, rel=1e-6)


def test_huge_logits_do_not_overflow():
    ref = np.array([[1e30, 0.0, -1e30]], np.float32)
    got = compare_logits(ref, ref)
    assert got.nonfinite == 0
    assert got.kl_max == 0


def test_meters_merge_to_the_whole(random):
    ref, cand = logits(random, 30, 64), logits(random, 30, 64)
    cand[3, 0] = np.nan
    whole = DifferenceMeter()
    whole.update(ref, cand)
    left, right = DifferenceMeter(), DifferenceMeter()
    left.update(ref[:11], cand[:11])
    right.update(ref[11:], cand[11:])
    left.merge(right)
    for name, value in whole.result().to_dict().items():
        assert left.result().to_dict()[name] == pytest.approx(value, rel=1e-5), name


def test_slack_is_asked_for_late_and_gives_the_exact_ratio(random):
    ref, cand = logits(random, 30, 300), logits(random, 30, 300)
    cand = ref + np.float32(3e-4) * (cand - cand.mean())
    slack = np.linspace(0, 2e-3, 30)
    asked = []

    def ask():
        asked.append(1)
        return slack

    meter = DifferenceMeter()
    meter.update(ref, cand, ask)
    assert not asked
    wide, error = np.abs(ref.astype(np.float64)), np.abs(ref.astype(np.float64) - cand)
    limit = 1e-4 + 1e-4 * wide
    over = (error > limit).any(axis=1, keepdims=True)
    assert over.all()
    assert meter.result().max_ratio == pytest.approx((error / (limit + slack[:, None])).max(), rel=1e-12)
    assert asked
    alone = [DifferenceMeter() for _ in ref]  # at each position, another value may be the worst
    for place, one in enumerate(alone):
        one.update(ref[place], cand[place], lambda place=place: slack[place : place + 1])
    found = [one.result().max_ratio for one in alone]
    assert found == pytest.approx((error / (limit + slack[:, None])).max(axis=1), rel=1e-12)


@pytest.mark.parametrize(
    ("best", "second", "error", "excused"),
    [
        (10.0, 9.999, 0.0006, True),  # margin 0.001 < 2 x 0.0006, and less than twice 1e-4 x (1 + 10)
        (10.0, 9.99, 0.006, False),  # the error explains it, but float32 does not explain the error
        (10.0, 5.0, 3.0, False),
    ],
)
def test_a_tie_needs_an_error_that_the_type_explains(best, second, error, excused):
    ref = np.array([[0.0, best, second, -3.0]], np.float32)
    cand = ref + np.array([[0.0, -error, error, 0.0]], np.float32)
    assert cand.argmax() == 2
    got = compare_logits(ref, cand)
    assert got.top1_raw == 0
    assert got.top1 == (1.0 if excused else 0.0)
    assert got.top1_misses == (0 if excused else 1)


def test_a_tie_of_two_does_not_excuse_a_third():
    ref = np.array([[10.0, 10.0, 5.0]], np.float32)
    cand = np.array([[10.0, 10.0, 15.0]], np.float32)
    assert compare_logits(ref, cand).top1_misses == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_values_that_are_no_numbers_are_counted_and_kept_out(random, bad, side):
    ref = logits(random, 5, 20)
    cand = ref.copy()
    (ref if side == "reference" else cand)[2, 7] = bad
    got = compare_logits(ref, cand)
    assert (got.positions, got.nonfinite, got.max_abs) == (5, 1, 0)


def test_shapes_must_agree(random):
    with pytest.raises(ShapeError, match=r"\(2, 5\).*\(2, 6\)"):
        compare_logits(logits(random, 2, 5), logits(random, 2, 6))


def test_nothing_compared():
    got = compare_logits(np.zeros((0, 5), np.float32), np.zeros((0, 5), np.float32))
    assert (got.positions, got.kl_mean) == (0, 0)


def test_a_large_vocabulary_needs_little_memory(random):
    ref = logits(random, 20, 150_000)
    cand = ref + np.float32(1e-5)
    tracemalloc.start()
    compare_logits(ref, cand)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < ref.nbytes


def test_log_softmax_sums_to_one(random):
    chances = log_softmax(logits(random, 3, 4, 9, scale=200))
    assert np.exp(chances).sum(-1) == pytest.approx(np.ones((3, 4)))
    assert chances.dtype == np.float64


def test_the_table_holds_what_was_promised():
    row = tolerance_for("float32")
    assert (row.atol, row.rtol, row.kl_mean, row.top1) == (1e-4, 1e-4, 1e-8, 1.0)
    promised = {"float16": (1e-4, 0.995), "bfloat16": (5e-4, 0.99), "int8": (5e-3, 0.98), "int4": (5e-2, 0.9)}
    assert {name: (TOLERANCES[name].kl_mean, TOLERANCES[name].top1) for name in promised} == promised
    with pytest.raises(UnsupportedOptionError, match="float8"):
        tolerance_for("float8")
    with pytest.raises(TypeError):
        TOLERANCES["float32"] = row
