"""Wanda against its definition."""

from collections.abc import Callable

import numpy as np
import pytest

from lmopt.compression.magnitude import Magnitude
from lmopt.compression.pruning import Sparsity
from lmopt.compression.statistics import Statistics
from lmopt.compression.wanda import Wanda
from lmopt.errors import InputError, ShapeError

Correlated = Callable[..., Statistics]


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_each_row_loses_what_contributes_least(sparsity: float, correlated: Correlated) -> None:
    matrix, statistics = weight(13, 30), correlated(30)
    before = matrix.copy()
    found = Wanda().apply(matrix, Sparsity(sparsity), "w", statistics)
    for row in range(13):
        scores = [abs(matrix[row, k]) * statistics.gram[k, k] ** 0.5 for k in range(30)]
        gone = set(np.argsort(scores)[: round(sparsity * 30)].tolist())
        assert set(np.flatnonzero(found[row] == 0).tolist()) == gone
    assert np.array_equal(found[found != 0], matrix[found != 0])
    assert np.array_equal(matrix, before), "the weight given was written to"


def test_each_window_keeps_what_contributes_most(correlated: Correlated) -> None:
    matrix, statistics = weight(13, 32), correlated(32)
    found = Wanda().apply(matrix, Sparsity(0.5, "2:4"), "w", statistics)
    scores = (np.abs(matrix) * np.sqrt(np.diagonal(statistics.gram))).reshape(-1, 4)
    assert np.array_equal(found.reshape(-1, 4) != 0, scores >= np.sort(scores, axis=1)[:, 2:3])


def test_it_loses_less_than_magnitude(correlated: Correlated) -> None:
    matrix, statistics = weight(40, 60), correlated(60)

    def loss(values: np.ndarray) -> float:
        return float(np.vdot((values - matrix) @ statistics.gram, values - matrix))

    for form in (Sparsity(0.5), Sparsity(0.5, "2:4")):
        ours = Wanda().apply(matrix, form, "w", statistics)
        assert loss(ours) < 0.8 * loss(Magnitude().apply(matrix, form, "w"))


def test_what_cannot_be_judged_is_refused(correlated: Correlated) -> None:
    matrix = weight(2, 8)
    with pytest.raises(InputError, match=r"layers\.0 has read nothing"):
        Wanda().apply(matrix, Sparsity(0.5), "layers.0", None)
    with pytest.raises(ShapeError, match=r"layers\.0 has 8 inputs"):
        Wanda().apply(matrix, Sparsity(0.5), "layers.0", correlated(9))
    matrix[0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        Wanda().apply(matrix, Sparsity(0.5), "layers.0", correlated(8))
