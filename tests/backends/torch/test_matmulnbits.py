"""What is handed to MatMulNBits means the weight: exactly, or to the error that is stated."""

import numpy as np
import pytest

from lmopt.backends.torch import matmulnbits
from lmopt.backends.torch.matmulnbits import Kernel
from lmopt.compression.layout import Grid, QuantizedArray, pack, unpack
from lmopt.errors import UnsupportedError


def array(bits: int, zero: str, columns: int = 64, group_size: int = 32, seed: int = 0) -> QuantizedArray:
    """A weight with half precision scales and offsets near the range that codes can reach, as GGUF has them."""
    random = np.random.default_rng(seed)
    grid = Grid(24, columns, bits, group_size, zero)
    codes = random.integers(0, 2**bits, (24, grid.groups, group_size), dtype=np.uint8)
    scales = (random.random((24, grid.groups)) + 0.1).astype(np.float16).astype(np.float32)
    offsets = (-scales * (2**bits - 1) * random.random(scales.shape)).astype(np.float16).astype(np.float32)
    return QuantizedArray(
        grid,
        pack(codes, grid),
        scales,
        random.integers(0, 2**bits, scales.shape, dtype=np.uint8) if zero == "integer" else None,
        offsets if zero == "offset" else None,
    )


def product(kernel: Kernel, x: np.ndarray) -> np.ndarray:
    """What the operator computes, in float64."""
    rows, blocks = kernel.scales.shape
    codes = unpack(kernel.codes, Grid(rows, blocks * kernel.block, kernel.bits, kernel.block)).astype(
        np.float64
    )
    zeros: np.ndarray = np.full((rows, blocks), 1 << (kernel.bits - 1))
    if kernel.zero_points is not None:
        width = kernel.zero_points.shape[1] * 8 // kernel.bits
        zeros = unpack(kernel.zero_points[:, None], Grid(rows, width, kernel.bits, width))[:, 0, :blocks]
    values = (codes - zeros[..., None]) * kernel.scales[..., None].astype(np.float64)
    return x @ values.reshape(rows, -1)[:, : kernel.columns].T


def rows_of(columns: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, columns))


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (100, 32), (96, 48), (64, 64)])
def test_products_add_up_to_the_weight(
    bits: int, zero: str, level: int, columns: int, group_size: int
) -> None:
    weight = array(bits, zero, columns, group_size)
    kernels = matmulnbits.kernels(weight, level)
    assert all(one.bits == 4 for one in kernels) or level == 4
    x = rows_of(columns)
    assert np.allclose(
        sum(product(one, x) for one in kernels), x @ weight.values().astype(np.float64).T, atol=1e-9
    )


def extended_product(weight: QuantizedArray, level: int) -> tuple[np.ndarray, np.ndarray, int]:
    bits, block = matmulnbits.kernel_bits(weight.grid, level), matmulnbits.block_size(weight.grid)
    digits = matmulnbits.digits(weight, bits, block)
    assert digits is not None
    x = rows_of(weight.grid.columns)
    slots = -(-weight.grid.groups // block) * block
    sums = product(matmulnbits.summing(weight.grid.columns, weight.grid.group_size, slots), x)
    assert np.allclose(sums[:, : weight.grid.groups], x.reshape(3, -1, weight.grid.group_size).sum(-1))
    assert (sums[:, weight.grid.groups :] == 0).all()
    longer = np.concatenate([x, *[sums] * digits.count], axis=1)
    return product(matmulnbits.extended(weight, digits, level), longer), x, digits.count


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [16, 32, 64])
@pytest.mark.parametrize("level", [1, 4])
def test_offsets_are_exact(bits: int, group_size: int, level: int) -> None:
    weight = array(bits, "offset", 128, group_size)
    ours, x, count = extended_product(weight, level)
    assert np.allclose(ours, x @ weight.values().astype(np.float64).T, atol=1e-9, rtol=0)
    assert count > 2


def test_offsets_beyond_digits_are_told() -> None:
    weight = array(4, "offset")
    assert weight.offsets is not None
    offsets = weight.offsets.copy()
    offsets[0] = np.float32(1e-20), np.float32(1e20)
    wild = QuantizedArray(weight.grid, weight.codes, weight.scales, offsets=offsets)
    assert matmulnbits.digits(wild, 4, 32) is None


def test_groups_without_a_block_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="16, 32, 64, 128 or 256"):
        matmulnbits.kernels(array(4, "symmetric", 64, 8), 1)
