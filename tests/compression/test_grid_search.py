"""Scales that are searched instead of taken from the extremes."""

import itertools

import numpy as np
import pytest

from lmopt.compression.grid_search import encode, search_groups
from lmopt.compression.layout import Grid, QuantizedArray, grouped, quantize
from lmopt.errors import InputError, ShapeError, UnsupportedOptionError


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Give a weight with a few outliers, as trained ones have them."""
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, columns)) * np.where(random.random((rows, columns)) < 0.02, 6, 1)
    return matrix.astype(np.float32)


def losses(array: QuantizedArray, matrix: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Give the error of each group."""
    square = np.square(array.values().astype(np.float64) - matrix) * importance
    return grouped(square, array.grid).sum(-1)


@pytest.mark.parametrize(
    ("bits", "columns", "symmetric"), list(itertools.product((2, 3, 4, 8), (64, 50), (True, False)))
)
def test_no_group_is_worse_than_with_the_plain_grid(bits: int, columns: int, symmetric: bool) -> None:
    matrix, importance = weight(300, columns), np.linspace(0, 3, columns, dtype=np.float32)
    before = matrix.copy()
    plain = quantize(matrix, bits, 32, symmetric=symmetric)
    found = encode(matrix, plain.grid, *search_groups(matrix, plain.grid, importance))
    old, new = (losses(array, matrix, importance) for array in (plain, found))
    assert (new <= old * 1.0001).all()
    assert new.sum() < 0.97 * old.sum()
    assert np.array_equal(matrix, before), "the weight given was written to"


@pytest.mark.parametrize("seed", range(5))
def test_a_group_comes_close_to_the_best_of_all_scales(seed: int) -> None:
    matrix, importance = weight(1, 16, seed), np.random.default_rng(seed).random(16).astype(np.float32)
    grid = Grid(1, 16, 3, 16)
    found = losses(encode(matrix, grid, *search_groups(matrix, grid, importance)), matrix, importance).sum()
    top = np.abs(matrix).max()
    every = [
        losses(encode(matrix, grid, np.full((1, 1), scale, np.float32)), matrix, importance).sum()
        for scale in np.linspace(-top, top, 8001)
    ]
    assert min(every) * 0.999 <= found <= min(every) * 1.1


def test_what_does_not_matter_may_be_cut_off() -> None:
    matrix = np.full((1, 32), 0.1, np.float32) * np.arange(-15, 17, dtype=np.float32)
    matrix[0, 0] = 8
    importance = np.ones(32, np.float32)
    importance[0] = 0
    grid = Grid(1, 32, 5, 32)
    values = encode(matrix, grid, *search_groups(matrix, grid, importance)).values()
    plain = quantize(matrix, 5, 32).values()
    assert np.abs(plain - matrix)[0, 1:].max() > 0.2
    assert np.abs(values - matrix)[0, 1:].max() < 0.08


def test_the_side_with_one_more_code_may_be_either() -> None:
    matrix = np.array([[1.01, *[-1.0] * 5, *[0.5] * 5, *[-0.5] * 5]], np.float32)
    grid, importance = Grid(1, 16, 2, 16), np.ones(16, np.float32)
    found = encode(matrix, grid, *search_groups(matrix, grid, importance))
    assert losses(found, matrix, importance).sum() < 0.3  # 1.01 is cut to 0.5, everything else is met


def test_a_whole_zero_may_move() -> None:
    matrix = np.array([[0.9, *[-1.0] * 5, *[-0.66] * 5, *[-0.33] * 5]], np.float32)
    grid, importance = Grid(1, 16, 2, 16, "integer"), np.ones(16, np.float32)
    importance[0] = 0.1
    scales, zeros = search_groups(matrix, grid, importance)
    assert zeros is not None
    assert zeros[0, 0] == 3
    assert losses(encode(matrix, grid, scales, zeros), matrix, importance).sum() < 0.1


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_do_not_depend_on_each_other(symmetric: bool) -> None:
    matrix, importance = weight(3000, 96), np.linspace(1, 2, 96, dtype=np.float32)
    zero = "symmetric" if symmetric else "integer"
    scales, zeros = search_groups(matrix, Grid(3000, 96, 4, 32, zero), importance)
    alone, zero_alone = search_groups(matrix[2990:2991], Grid(1, 96, 4, 32, zero), importance)
    assert np.array_equal(scales[2990:2991], alone)
    assert (zeros is None) == symmetric
    if zeros is not None:
        assert np.array_equal(zeros[2990:2991], zero_alone)


@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_scales_give_plain_codes(symmetric: bool) -> None:
    matrix = weight(20, 50)
    plain = quantize(matrix, 4, 32, symmetric=symmetric)
    again = encode(matrix, plain.grid, plain.scales, plain.zero_points)
    assert np.array_equal(again.codes, plain.codes)
    assert np.array_equal(again.values(), plain.values())


def test_an_offset_may_lie_between_codes() -> None:
    grid = Grid(1, 8, 4, 8, "offset")
    matrix = (0.5 * (np.arange(8, dtype=np.float32) - 2.25))[None]
    array = encode(matrix, grid, np.full((1, 1), 0.5, np.float32), np.full((1, 1), 2.25, np.float32))
    assert np.array_equal(array.values(), matrix)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_huge_weights_stay_finite(symmetric: bool) -> None:
    matrix = np.zeros((3, 32), np.float32)
    matrix[1, 0], matrix[2, :2] = 1e-40, (3e38, -3e38)
    grid = Grid(3, 32, 4, 32, "symmetric" if symmetric else "integer")
    values = encode(matrix, grid, *search_groups(matrix, grid, np.ones(32, np.float32))).values()
    assert np.isfinite(values).all()
    assert (values[:2] == 0).all()


def test_strange_arguments_are_refused() -> None:
    matrix, importance = weight(2, 32), np.ones(32, np.float32)
    with pytest.raises(UnsupportedOptionError, match="offset"):
        search_groups(matrix, Grid(2, 32, 4, 32, "offset"), importance)
    with pytest.raises(ShapeError, match="importance"):
        search_groups(matrix, Grid(2, 32, 4, 32), importance[:8])
    matrix[0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        search_groups(matrix, Grid(2, 32, 4, 32), importance)
