"""Scales of inputs: AWQ's search and SmoothQuant's rule."""

import numpy as np
import pytest

from lmopt.compression import AWQ, SmoothQuant
from lmopt.compression.layout import quantize
from lmopt.compression.scaling import scaled, search_scales, smoothing_scales
from lmopt.compression.statistics import Statistics
from lmopt.errors import UnsupportedOptionError


def inputs(loud=30.0, tokens=400, columns=64):
    random = np.random.default_rng(0)
    x = random.normal(size=(tokens, columns)).astype(np.float32)
    x[:, ::16] *= loud
    return x


def statistics(x):
    return Statistics(
        (x.T @ x / len(x)).astype(np.float32), np.abs(x).mean(0), np.abs(x).max(0).astype(np.float32), len(x)
    )


def weight(rows=48, columns=64):
    return np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32)


def loss(matrix, scales, x, bits=3, group=32):
    values = quantize(matrix * scales, bits, group).values() / scales
    return float((((values - matrix) @ x.T) ** 2).sum())


def test_the_scales_found_are_the_best_of_the_grid():
    x, matrix = inputs(), weight()
    read = statistics(x)
    found = search_scales([matrix], read, lambda one, n: quantize(one, 3, 32), n_grid=10)
    tried = [read.mean_abs.astype(np.float64) ** (n / 10) for n in range(11)]
    losses = [loss(matrix, (s / np.sqrt(s.max() * s.min())).astype(np.float32), x) for s in tried]
    assert loss(matrix, found, x) == pytest.approx(min(losses), rel=1e-4)
    assert min(losses) < 0.5 * losses[0]


def test_equal_inputs_ask_for_no_scales():
    x = np.where(np.random.default_rng(0).random((400, 64)) < 0.5, -1, 1).astype(np.float32)
    assert search_scales([weight()], statistics(x), lambda one, n: quantize(one, 3, 32), n_grid=4) is None


def test_dead_inputs_give_finite_scales():
    x = inputs()
    x[:, 5] = 0
    for found in (
        search_scales([weight()], statistics(x), lambda one, n: quantize(one, 3, 32), n_grid=4),
        smoothing_scales([weight()], statistics(x), 0.5),
    ):
        assert np.isfinite(found).all()
        assert (found > 0).all()


def test_smoothing_shares_the_outliers():
    x, matrix = inputs(), weight()
    found = smoothing_scales([matrix], statistics(x), 0.5)
    # Equation 4: at alpha = 0.5 both sides have the same largest value, up to one common factor.
    ratio = (np.abs(x).max(0) / found) / (np.abs(matrix).max(0) * found)
    assert np.allclose(ratio, ratio[0], rtol=1e-4)
    assert np.allclose(
        smoothing_scales([matrix], statistics(x), 1.0) / np.abs(x).max(0),
        1 / np.abs(x).max(0)[0] * smoothing_scales([matrix], statistics(x), 1.0)[0],
        rtol=1e-4,
    )


def test_statistics_of_scaled_inputs():
    x = inputs()
    s = np.random.default_rng(2).uniform(0.5, 2, 64).astype(np.float32)
    one, other = scaled(statistics(x), s), statistics(x / s)
    assert np.allclose(one.gram, other.gram, rtol=1e-3, atol=1e-4)
    assert np.allclose(one.mean_abs, other.mean_abs, rtol=1e-4)
    assert np.allclose(one.max_abs, other.max_abs, rtol=1e-4)


@pytest.mark.parametrize(
    "build", [lambda: AWQ(n_grid=0), lambda: SmoothQuant(alpha=1.5), lambda: AWQ(bits=1)]
)
def test_fields_are_checked(build):
    with pytest.raises(UnsupportedOptionError, match="expected"):
        build()
