"""Pruning by magnitude."""

import numpy as np
import pytest

from lmopt.compression.magnitude import Magnitude
from lmopt.compression.pruning import Sparsity
from lmopt.errors import InputError


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.77])
def test_the_smallest_of_the_matrix_become_zero_and_no_more(sparsity: float) -> None:
    matrix = weight(13, 29)
    before = matrix.copy()
    found = Magnitude().apply(matrix, Sparsity(sparsity), "w")
    gone = found == 0
    assert gone.sum() == round(sparsity * 13 * 29)
    assert np.array_equal(found[~gone], matrix[~gone])
    if gone.any():
        assert np.abs(matrix[gone]).max() < np.abs(matrix[~gone]).min()
    assert found.dtype == np.float32
    assert np.array_equal(matrix, before), "the weight given was written to"


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_each_window_keeps_its_largest(pattern: str, kept: int, of: int) -> None:
    matrix = weight(10, 32)
    found = Magnitude().apply(matrix, Sparsity(1 - kept / of, pattern), "w")
    windows, pruned = matrix.reshape(-1, of), found.reshape(-1, of)
    assert ((pruned != 0).sum(1) == kept).all()
    largest = np.sort(np.abs(windows), axis=1)[:, -kept:]
    assert np.array_equal(np.sort(np.abs(pruned), axis=1)[:, -kept:], largest)


def test_damage_is_refused() -> None:
    matrix = weight(2, 8)
    matrix[0, 0] = np.nan
    with pytest.raises(InputError, match=r"layers\.0 holds NaN"):
        Magnitude().apply(matrix, Sparsity(0.5), "layers.0")
    with pytest.raises(InputError, match="does not divide"):
        Magnitude().apply(weight(2, 6), Sparsity(0.5, "2:4"), "layers.0")
