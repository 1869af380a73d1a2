"""HQQ: grids that are fitted to a weight alone."""

import json

import numpy as np
import pytest

from lmopt.compression.grid_search import encode
from lmopt.compression.hqq import HQQ
from lmopt.compression.layout import grouped, quantize
from lmopt.compression.round_to_nearest import Form
from lmopt.errors import InputError, UnsupportedOptionError


def with_outliers(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, columns)) + 0.3
    return (matrix * np.where(random.random((rows, columns)) < 0.02, 5, 1)).astype(np.float32)


def losses(values: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    square = np.square(values.astype(np.float64) - matrix)
    return np.add.reduceat(square, np.arange(0, matrix.shape[1], size), axis=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("columns", "size"), [(128, 64), (50, 32)])
@pytest.mark.parametrize(
    ("symmetric", "zero", "share"),
    [(True, "integer", 0.98), (False, "integer", 0.98), (False, "offset", 0.95)],
)
def test_no_group_is_worse_than_rounded_and_outliers_cost_less(
    bits: int, columns: int, size: int, symmetric: bool, zero: str, share: float
) -> None:
    matrix = with_outliers(200, columns)
    before = matrix.copy()
    step = HQQ(zero=zero)  # type: ignore[arg-type]
    found = step.apply(matrix, Form(bits, size, symmetric), "w")
    plain = quantize(matrix, bits, size, symmetric=symmetric)
    old, new = (losses(array.values(), matrix, size) for array in (plain, found))
    assert found.grid.zero == ("symmetric" if symmetric else zero)
    assert (new <= old * 1.0001).all()
    assert new.sum() < share * old.sum()
    assert np.array_equal(matrix, before), "the weight given was written to"


def test_a_float_zero_fits_more_closely_than_a_whole_one() -> None:
    matrix = with_outliers(100, 64)
    whole, between = (
        HQQ(zero=zero).apply(matrix, Form(3, 32, False), "w").values()  # type: ignore[arg-type]
        for zero in ("integer", "offset")
    )
    assert losses(between, matrix, 32).sum() < losses(whole, matrix, 32).sum()


@pytest.mark.parametrize("columns", [32, 20])
@pytest.mark.parametrize("zero", ["integer", "offset"])
def test_it_is_the_papers_iteration(zero: str, columns: int) -> None:
    """One group, full or not, every line of the method written out."""
    matrix = with_outliers(1, columns, seed=4)
    size, p, beta, kappa = 32, 0.7, 10.0, 1.01
    plain = quantize(matrix, 3, size, symmetric=False)
    assert plain.zero_points is not None
    w, scale, z = matrix[0].astype(np.float64), float(plain.scales[0, 0]), float(plain.zero_points[0, 0])
    unit, best, kept = scale, np.inf, (scale, z)
    for _ in range(21):
        codes = np.clip(np.rint(w / scale + z), 0, 7)
        error = w - scale * (codes - z)
        if (error**2).sum() < best * (1 - 1e-9):
            best, kept = (error**2).sum(), (scale, z)
        steps = error / unit
        sparse = np.sign(steps) * np.maximum(np.abs(steps) - np.abs(steps) ** (p - 1) / beta, 0) * unit
        z = (codes - (w - sparse) / scale).mean()
        if zero == "integer":
            z = np.clip(np.rint(z), 0, 7)
        scale = ((codes - z) * (w - sparse)).sum() / ((codes - z) ** 2).sum()
        beta *= kappa
    assert kept[0] != unit, "the case shows nothing"
    step = HQQ(zero=zero)  # type: ignore[arg-type]
    found = step.apply(matrix, Form(3, size, False), "w")
    assert found.scales[0, 0] == pytest.approx(kept[0], rel=1e-4)
    if zero == "integer":
        assert found.zero_points is not None
        assert found.zero_points[0, 0] == kept[1]
    else:
        assert found.offsets is not None
        assert found.offsets[0, 0] == pytest.approx(-kept[0] * kept[1], rel=1e-4)


def test_codes_are_the_nearest_of_the_grid_and_results_are_the_same() -> None:
    matrix = with_outliers(3000, 96)
    step, form = HQQ(zero="integer"), Form(4, 32, False)
    found = step.apply(matrix, form, "w")
    again = encode(matrix, found.grid, found.scales, found.zero_points)
    assert np.array_equal(again.codes, found.codes)
    alone = step.apply(matrix[2990:2991], form, "w")
    assert np.array_equal(alone.codes, found.codes[2990:2991]), "rows depend on each other"
    assert np.array_equal(step.apply(matrix, form, "w").codes, found.codes)


@pytest.mark.parametrize("zero", ["integer", "offset"])
def test_zeros_and_constants_stay_exact(zero: str) -> None:
    matrix = np.zeros((3, 32), np.float32)
    matrix[1], matrix[2, 0] = 0.25, 1e-40
    values = HQQ(zero=zero).apply(matrix, Form(4, 32, False), "w").values()  # type: ignore[arg-type]
    assert np.isfinite(values).all()
    assert (values[0] == 0).all()
    assert np.allclose(values[1], 0.25)
    assert grouped(values, quantize(matrix, 4, 32).grid).shape == (3, 1, 32)


def test_a_damaged_weight_is_refused() -> None:
    matrix = with_outliers(2, 32)
    matrix[0, 0] = np.inf
    with pytest.raises(InputError, match=r"layers\.0"):
        HQQ().apply(matrix, Form(4, 32, False), "layers.0")


@pytest.mark.parametrize(
    "fields",
    [{"p": 0}, {"p": 1.5}, {"beta": 0}, {"kappa": 0.5}, {"iterations": 0}, {"zero": "float"}, {"bits": 1}],
)
def test_impossible_steps_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedOptionError):
        HQQ(**fields)  # type: ignore[arg-type]


def test_the_step_is_plain_data() -> None:
    step = HQQ(bits=3, zero="offset")
    told = json.loads(json.dumps(step.to_dict()))
    assert told.pop("step") == "hqq"
    assert HQQ(**told) == step
    assert not HQQ.needs_texts
    assert not step.symmetric
