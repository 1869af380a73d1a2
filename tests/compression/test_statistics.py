"""What is gathered of a linear's inputs."""

import numpy as np
import pytest

from lmopt.compression.statistics import Statistics
from lmopt.errors import DtypeError, InputError, ShapeError


def inputs(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)


@pytest.mark.parametrize("columns", [1, 7, 512])
def test_the_numbers_are_means_over_the_tokens(columns: int) -> None:
    given = inputs(300, columns)
    before, every = given.copy(), given.astype(np.float64)
    found = Statistics.of(given)
    assert (found.tokens, found.columns) == (300, columns)
    assert np.allclose(found.gram, every.T @ every / 300, atol=1e-5)
    assert np.allclose(found.mean_abs, np.abs(every).mean(0), rtol=1e-6)
    assert np.array_equal(found.max_abs, np.abs(given).max(0))
    assert np.array_equal(given, before)


def test_strange_inputs_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected \(tokens"):
        Statistics.of(np.ones(4, np.float32))
    with pytest.raises(DtypeError, match="float64"):
        Statistics.of(inputs(5, 3).astype(np.float64))
    with pytest.raises(InputError, match="no token"):
        Statistics.of(inputs(0, 3))
    with pytest.raises(InputError, match="overflows"):
        Statistics.of(np.array([[1, np.inf, 0]], np.float32))


def test_arrays_must_belong_together() -> None:
    square, row = np.eye(3, dtype=np.float32), np.ones(3, np.float32)
    with pytest.raises(ShapeError, match=r"mean_abs .* expected \(3,\)"):
        Statistics(square, row[:2], row, 1)
    with pytest.raises(ShapeError, match="gram"):
        Statistics(square[:2], row, row, 1)
    with pytest.raises(DtypeError, match="max_abs"):
        Statistics(square, row, row.astype(np.float64), 1)
    with pytest.raises(ShapeError, match=r"layers\.0 has 4 inputs and the statistics 3"):
        Statistics(square, row, row, 1).check(4, "layers.0")
