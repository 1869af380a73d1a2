"""The layout of quantized weights: packing, rounding, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmopt.compression.layout import BITS, Grid, QuantizedArray, grouped, pack, quantize, to_half, unpack
from lmopt.errors import CorruptArtifactError, InputError, UnsupportedOptionError


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@given(
    bits=st.sampled_from(BITS),
    eighths=st.integers(1, 9),
    columns=st.integers(1, 150),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing(bits: int, eighths: int, columns: int, rows: int, seed: int) -> None:
    grid = Grid(rows, columns, bits, 8 * eighths)
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, grid.groups, 8 * eighths), dtype=np.uint8)
    packed = pack(codes, grid)
    assert packed.shape == grid.shapes()["codes"][0]
    assert np.array_equal(unpack(packed, grid), codes)


@pytest.mark.parametrize(
    ("bits", "expected"), [(4, [0x21, 0x43]), (2, [0b11100100]), (3, [0b10001000, 0xC6, 0xFA])]
)
def test_low_bits_come_first(bits: int, expected: list[int]) -> None:
    codes = {4: [1, 2, 3, 4], 2: [0, 1, 2, 3], 3: [0, 1, 2, 3, 4, 5, 6, 7]}[bits]
    grid = Grid(1, len(codes), bits, len(codes))
    assert pack(np.array([[codes]], np.uint8), grid)[0, 0].tolist() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_meets_the_nearest_code(bits: int, columns: int, symmetric: bool) -> None:
    matrix = weight(5, columns)
    before = matrix.copy()
    array = quantize(matrix, bits, 32, symmetric=symmetric)
    assert np.array_equal(matrix, before), "the weight given was written to"
    codes = unpack(array.codes, array.grid).astype(np.float64)
    zero = (
        array.grid.midpoint if array.zero_points is None else array.zero_points[..., None].astype(np.float64)
    )
    every = (np.arange(2**bits)[None, None] - zero) * array.scales[..., None].astype(np.float64)
    groups = grouped(matrix, array.grid)
    nearest = np.abs(groups[..., None] - every[:, :, None, :]).min(-1)
    chosen = np.abs(groups - (codes - zero) * array.scales[..., None])
    assert (chosen <= nearest + 1e-6).all()


def test_a_symmetric_group_meets_its_extreme_value() -> None:
    matrix = np.array([[0.1, -0.7, 0.2, 0.3] * 8, [0.1, 0.9, -0.2, 0.3] * 8], np.float32)
    values = quantize(matrix, 4, 32).values()
    assert np.allclose(values[:, 1], matrix[:, 1], rtol=1e-6)


def test_values_follow_the_order_of_operations() -> None:
    random = np.random.default_rng(3)
    grid = Grid(2, 32, 4, 16, "offset")
    codes = random.integers(0, 16, (2, 2, 16), dtype=np.uint8)
    scales, offsets = (random.standard_normal((2, 2)).astype(np.float32) for _ in range(2))
    array = QuantizedArray(grid, pack(codes, grid), scales, offsets=offsets)
    expected = codes.astype(np.float32) * scales[..., None] + offsets[..., None]
    assert np.array_equal(array.values(), expected.reshape(2, 32))


def test_zeros_and_tiny_groups_stay_finite() -> None:
    matrix = np.zeros((3, 32), np.float32)
    matrix[1, 0], matrix[2, :2] = 1e-40, (3e38, -3e38)
    for symmetric in (True, False):
        values = quantize(matrix, 4, 32, symmetric=symmetric).values()
        assert np.isfinite(values).all()
        assert (values[0] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_damaged_weight_is_refused(value: float) -> None:
    matrix = weight(2, 32)
    matrix[1, 3] = value
    with pytest.raises(InputError, match=r"layers\.0 holds NaN or infinity"):
        quantize(matrix, 4, 32, what="layers.0")


@pytest.mark.parametrize(
    ("bits", "group_size"), [(1, 32), (9, 32), (4, 0), (4, -32), (4, 7), (3, 20), (True, 32)]
)
def test_impossible_forms_are_refused(bits: int, group_size: int) -> None:
    with pytest.raises(UnsupportedOptionError):
        Grid(4, 64, bits, group_size)


def test_arrays_must_fit_their_form() -> None:
    array = quantize(weight(4, 64), 4, 32, symmetric=False)
    assert array.zero_points is not None
    with pytest.raises(CorruptArtifactError, match="consists of codes, scales, zero_points"):
        QuantizedArray(array.grid, array.codes, array.scales)
    with pytest.raises(CorruptArtifactError, match=r"codes .* needs uint8 of shape"):
        QuantizedArray(array.grid, array.codes[:, :1], array.scales, array.zero_points)
    with pytest.raises(CorruptArtifactError, match="largest code"):
        QuantizedArray(array.grid, array.codes, array.scales, array.zero_points + np.uint8(16))
    scales = array.scales.copy()
    scales[0, 0] = np.nan
    with pytest.raises(CorruptArtifactError, match="NaN"):
        QuantizedArray(array.grid, array.codes, scales, array.zero_points)


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_scales_are_rounded_before_the_codes(symmetric: bool) -> None:
    matrix = weight(40, 64)
    array = quantize(matrix, 4, 32, symmetric=symmetric, half=True)
    assert np.array_equal(array.scales, array.scales.astype(np.float16).astype(np.float32))
    assert not np.array_equal(array.scales, quantize(matrix, 4, 32, symmetric=symmetric).scales)
    zero = 8 if array.zero_points is None else array.zero_points[..., None].astype(np.float32)
    steps = np.rint(grouped(matrix, array.grid) / array.scales[..., None]) + zero
    # A division and a product with the inverse may part at ties, which are rare.
    assert (np.clip(steps, 0, 15) == unpack(array.codes, array.grid)).mean() > 0.999


def test_numbers_that_half_precision_holds_badly_stay() -> None:
    for numbers in ([1e5, 1.0], [3e-6, 2e-6], [0.01, 5e-5]):
        given = np.array([numbers], np.float32) * np.float32(1.0001)
        assert np.array_equal(to_half(given), given)
    small = np.array([[1.0001, 1e-9, 0]], np.float32)
    assert to_half(small).tolist() == [[1.0, 0, 0]], "next to nothing beside the largest"
    offsets = np.array([[0.01, 5e-5]], np.float32)
    assert not np.array_equal(to_half(offsets, scales=False), offsets)
