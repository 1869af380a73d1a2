"""SparseGPT against a loop that follows the paper word by word."""

from collections.abc import Callable

import numpy as np
import pytest

from lmopt.compression.hessian import DampedWarning
from lmopt.compression.pruning import Sparsity
from lmopt.compression.sparsegpt import SparseGPT
from lmopt.compression.statistics import Statistics
from lmopt.compression.wanda import Wanda
from lmopt.errors import InputError, ShapeError, UnsupportedOptionError

Correlated = Callable[..., Statistics]


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def naive(matrix: np.ndarray, hessian: np.ndarray, block: int, form: Sparsity) -> np.ndarray:
    """Go column by column; the inverse of what is left is computed anew each time."""
    left, columns = matrix.astype(np.float64), matrix.shape[1]
    # [H^-1]_jj once all columns before j are out of it.
    pivots = np.array([np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(columns)])
    gone = np.zeros(matrix.shape, bool)
    for j in range(columns):
        if form.pattern is None and j % block == 0:
            part = slice(j, j + block)
            scores = left[:, part] ** 2 / pivots[part]
            count = round(form.sparsity * scores.size)
            gone[:, part] = scores <= np.sort(scores, axis=None)[count - 1]
        elif form.pattern is not None and j % form.window()[1] == 0:
            kept, of = form.window()
            scores = left[:, j : j + of] ** 2 / pivots[j : j + of]
            gone[:, j : j + of] = scores <= np.sort(scores, axis=1)[:, of - kept - 1 : of - kept]
        inverse = np.linalg.inv(hessian[j:, j:])
        error = np.where(gone[:, j], left[:, j], 0) / inverse[0, 0]
        left[:, j:] -= np.outer(error, inverse[0])
        left[gone[:, j], j] = 0
    return left


@pytest.mark.parametrize(
    ("form", "block"),
    [
        (Sparsity(0.5), 16),
        (Sparsity(0.5), 64),
        (Sparsity(0.25), 40),
        (Sparsity(0.5, "2:4"), 30),
        (Sparsity(0.75, "1:4"), 16),
    ],
)
def test_it_is_the_naive_loop(form: Sparsity, block: int, correlated: Correlated) -> None:
    matrix, statistics = weight(20, 80), correlated(80)
    before = matrix.copy()
    gram = statistics.gram.astype(np.float64)
    hessian = gram + 0.01 * np.diagonal(gram).mean() * np.eye(80)
    step = SparseGPT(damping=0.01, shrinkage=0, block_size=block)
    found = step.apply(matrix, form, "w", statistics)
    expected = naive(matrix, hessian, block, form)
    assert ((found == 0) == (expected == 0)).mean() > 0.99
    assert np.isclose(found, expected, atol=2e-3).mean() > 0.97
    assert np.array_equal(matrix, before), "the weight given was written to"


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.83])
def test_every_block_has_its_share_of_zeros(sparsity: float, correlated: Correlated) -> None:
    found = SparseGPT(block_size=32).apply(weight(15, 80), Sparsity(sparsity), "w", correlated(80))
    assert (found == 0).sum() == round(sparsity * found.size)
    for start in (0, 32, 64):
        block = found[:, start : start + 32]
        assert abs((block == 0).sum() - sparsity * block.size) <= 1


@pytest.mark.parametrize(
    ("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4), ("3:5", 3, 5)]
)
def test_each_window_keeps_as_many_as_it_may(
    pattern: str, kept: int, of: int, correlated: Correlated
) -> None:
    step = SparseGPT(block_size=33)  # which no window divides
    found = step.apply(weight(15, 120), Sparsity(1 - kept / of, pattern), "w", correlated(120))
    assert ((found.reshape(-1, of) != 0).sum(1) == kept).all()


@pytest.mark.parametrize("form", [Sparsity(0.5), Sparsity(0.5, "2:4")])
def test_it_loses_less_than_wanda(form: Sparsity, correlated: Correlated) -> None:
    matrix, statistics = weight(40, 60), correlated(60)

    def loss(values: np.ndarray) -> float:
        return float(np.vdot((values - matrix) @ statistics.gram, values - matrix))

    ours = SparseGPT().apply(matrix, form, "w", statistics)
    assert loss(ours) < 0.75 * loss(Wanda().apply(matrix, form, "w", statistics))


def test_nothing_pruned_leaves_the_weight_as_it_is(correlated: Correlated) -> None:
    matrix = weight(5, 40)
    assert np.array_equal(SparseGPT().apply(matrix, Sparsity(0), "w", correlated(40)), matrix)


def test_weights_of_an_input_that_is_always_zero_go_first(correlated: Correlated) -> None:
    gram = correlated(40).gram.copy()
    gram[5] = gram[:, 5] = 0
    row = np.ones(40, np.float32)
    found = SparseGPT().apply(100 * weight(10, 40), Sparsity(0.1), "w", Statistics(gram, row, row, 10))
    assert (found[:, 5] == 0).all()
    assert (found == 0).sum() == 40


def test_a_singular_hessian_is_damped_and_it_is_said(correlated: Correlated) -> None:
    with pytest.warns(DampedWarning, match="singular"):
        found = SparseGPT(damping=0, shrinkage=0).apply(
            weight(10, 64), Sparsity(0.5), "w", correlated(64, tokens=8)
        )
    assert np.isfinite(found).all()


def test_what_cannot_be_judged_is_refused(correlated: Correlated) -> None:
    matrix = weight(2, 6)
    with pytest.raises(InputError, match=r"layers\.0 has read nothing"):
        SparseGPT().apply(matrix, Sparsity(0.5), "layers.0", None)
    with pytest.raises(ShapeError, match=r"layers\.0 has 6 inputs"):
        SparseGPT().apply(matrix, Sparsity(0.5), "layers.0", correlated(9))
    with pytest.raises(InputError, match="does not divide"):
        SparseGPT().apply(matrix, Sparsity(0.5, "2:4"), "layers.0", correlated(6))
    matrix[0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        SparseGPT().apply(matrix, Sparsity(0.5), "layers.0", correlated(6))


@pytest.mark.parametrize("fields", [{"damping": -1}, {"shrinkage": 1.5}, {"block_size": 0}])
def test_impossible_steps_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedOptionError):
        SparseGPT(**fields)  # type: ignore[arg-type]
