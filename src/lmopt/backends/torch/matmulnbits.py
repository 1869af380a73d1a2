"""From the layout of quantized weights to what ONNX Runtime's `MatMulNBits` is fast at.

Measured in docs/results/matmulnbits-kernels.md: on CPU the operator has quick kernels for 4-bit codes, and
for 2 and 8 bits only if activations are rounded to 8 bits (`accuracy_level=4`), in blocks of a power of two
from 16 up, with no or whole zero points. With float zero points, and with 8-bit codes and float
activations, it dequantizes the whole weight at every call: a hundred times slower.

So an 8-bit weight for float activations becomes two 4-bit ones, its high and its low half. And a float
offset of each group becomes *more columns*: with `z` the whole zero point nearest to it,

    scale * code + offset = scale * (code - z) + rest,      rest = offset + scale * z

and the rests of a row, `groups` numbers that multiply the sums of the activation over each group, are
written as digits in base `2**bits`, lowest first, each digit one more block of codes with a power of two as
its scale. All of it is exact: offsets and scales of GGUF files are half precision numbers, whose sums fit a
few digits. The extra columns cost two small operators and about a tenth more weights, instead of three
operators and a product in float32.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lmopt.compression.layout import Codes, Grid, QuantizedArray, pack, unpack
from lmopt.errors import UnsupportedError
from lmopt.types import FloatArray

INT8_ACTIVATIONS: Final = 4
"""The accuracy level at which the operator rounds activations to 8 bits, block by block."""

MOST_DIGITS: Final = 6
_SMALLEST_BLOCK: Final = 16
_LARGEST_BLOCK: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """Inputs and attributes of one `MatMulNBits`.

    Attributes:
        bits: 2, 4 or 8.
        block: Columns of a block.
        columns: Columns of its input.
        codes: `(rows, blocks, block * bits / 8)` uint8.
        scales: `(rows, blocks)` float32.
        zero_points: `(rows, ceil(blocks * bits / 8))` uint8, packed, or `None` for the middle code.
    """

    bits: int
    block: int
    columns: int
    codes: Codes
    scales: FloatArray
    zero_points: Codes | None = None


def largest_block(columns: int) -> int:
    """Largest block of the operator that divides so many columns, 0 where none does."""
    block = min(columns & -columns, _LARGEST_BLOCK)
    return block if block >= _SMALLEST_BLOCK else 0


def block_size(grid: Grid) -> int:
    """Largest block of the operator that divides a group.

    Raises:
        UnsupportedError: There is none.
    """
    block = largest_block(grid.group_size)
    if not block:
        raise UnsupportedError(
            f"groups of {grid.group_size} columns do not divide into the blocks of ONNX Runtime's MatMulNBits: "
            "16, 32, 64, 128 or 256 columns. Use such a group_size, or target='portable'."
        )
    return block


def kernel_bits(grid: Grid, accuracy_level: int) -> int:
    """Width of the kernel that holds a grid's codes: 2, 4 or 8."""
    if grid.bits == 2 and accuracy_level == INT8_ACTIVATIONS:
        return 2
    return 4 if grid.bits <= 4 else 8


def kernels(weight: QuantizedArray, accuracy_level: int) -> list[Kernel]:
    """Write a weight as one or two products that are added; offsets are left out.

    Args:
        weight: The weight. Where it has offsets, `zero_points` must hold the whole part of them.
        accuracy_level: 4 where activations may be rounded to 8 bits.

    Raises:
        UnsupportedError: The operator has no such blocks.
    """
    grid = weight.grid
    block, bits = block_size(grid), kernel_bits(grid, accuracy_level)
    scales = np.repeat(weight.scales, grid.group_size // block, axis=1)
    blocks = -(-grid.columns // block)
    scales = np.ascontiguousarray(scales[:, :blocks])
    zeros = weight.zero_points
    if zeros is not None:
        zeros = np.repeat(zeros, grid.group_size // block, axis=1)[:, :blocks]
    if bits == grid.bits and (bits != 8 or accuracy_level == INT8_ACTIVATIONS):
        codes = weight.codes.reshape(grid.rows, -1, block * bits // 8)[:, :blocks]
        packed_zeros = None if zeros is None else _pack_row(zeros, bits)
        return [Kernel(bits, block, grid.columns, codes, scales, packed_zeros)]
    codes = unpack(weight.codes, grid).reshape(grid.rows, -1, block)[:, :blocks]
    if zeros is None:
        # Moving codes and middle alike keeps the operator without zero points.
        codes = codes + np.uint8((1 << (bits - 1)) - grid.midpoint)
    form = Grid(grid.rows, blocks * block, bits, block)
    if bits != 8 or accuracy_level == INT8_ACTIVATIONS:
        packed_zeros = None if zeros is None else _pack_row(zeros, bits)
        return [Kernel(bits, block, grid.columns, pack(codes, form), scales, packed_zeros)]
    half = Grid(grid.rows, blocks * block, 4, block)
    zeros = np.full((grid.rows, blocks), 128, np.uint8) if zeros is None else zeros
    return [
        Kernel(4, block, grid.columns, pack(part, half), factor, _pack_row(zero, 4))
        for part, factor, zero in (
            (_high(codes), scales * np.float32(16), _high(zeros)),
            (_low(codes), scales, _low(zeros)),
        )
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Offsets of a weight as digits.

    Attributes:
        zero_points: `(rows, groups)` uint8, the whole part.
        codes: `(rows, digits * blocks, block)` uint8, lowest digit first.
        scales: `(rows, digits * blocks)` float32, powers of two.
        count: Digits of a rest.
    """

    zero_points: Codes
    codes: Codes
    scales: FloatArray
    count: int


def digits(weight: QuantizedArray, bits: int, block: int, count: int | None = None) -> Digits | None:
    """Write the offsets of a weight as digits, exactly.

    Args:
        weight: A weight with offsets.
        bits: Bits of a digit.
        block: Groups whose digits share a scale.
        count: Digits to write; as few as are needed where `None`.

    Returns:
        The digits, or `None` where `MOST_DIGITS` of them cannot hold the offsets exactly.
    """
    assert weight.offsets is not None
    scales, offsets = weight.scales.astype(np.float64), weight.offsets.astype(np.float64)
    nearest = np.divide(-offsets, scales, out=np.zeros_like(scales), where=scales != 0)
    zeros = np.clip(np.rint(nearest), 0, 2**weight.grid.bits - 1)
    # Exact in float64: products of 24 and 8 bits, of like size as the offset.
    rest = offsets + scales * zeros
    rows, groups = rest.shape
    blocks = -(-groups // block)
    rest = np.pad(rest, ((0, 0), (0, blocks * block - groups))).reshape(rows, blocks, block)
    unit = _common_unit(rest)
    largest = np.abs(rest).max(-1)
    base, middle = 1 << bits, 1 << (bits - 1)
    needed = next((n for n in range(1, MOST_DIGITS + 1) if (largest <= _reach(base, n) * unit).all()), None)
    if needed is None or (count is not None and needed > count):
        return None
    count = count or needed
    left = np.rint(rest / unit[..., None]).astype(np.int64)
    codes, powers = [], []
    for place in range(count):
        digit = (left + middle) % base - middle
        left = (left - digit) // base
        codes.append((digit + middle).astype(np.uint8))
        powers.append((unit * float(base) ** place).astype(np.float32))
    assert not left.any()  # all is within reach of the digits
    return Digits(zeros.astype(np.uint8), np.concatenate(codes, 1), np.concatenate(powers, 1), count)


def extended(weight: QuantizedArray, parts: Digits, accuracy_level: int) -> Kernel:
    """Join a weight and the digits of its offsets into one product.

    Its input is the activation, followed `parts.count` times by the sums over each group, filled up to
    whole blocks.
    """
    grid = weight.grid
    whole = QuantizedArray(
        Grid(grid.rows, grid.columns, grid.bits, grid.group_size, "integer"),
        weight.codes,
        weight.scales,
        parts.zero_points,
    )
    (main,) = kernels(whole, accuracy_level)
    form = Grid(grid.rows, parts.codes.shape[1] * main.block, main.bits, main.block)
    zeros = np.repeat(parts.zero_points, grid.group_size // main.block, axis=1)
    middle = np.full(parts.scales.shape, 1 << (main.bits - 1), np.uint8)
    return Kernel(
        main.bits,
        main.block,
        grid.columns + form.columns,
        np.concatenate([main.codes, pack(parts.codes, form)], axis=1),
        np.concatenate([main.scales, parts.scales], axis=1),
        _pack_row(np.concatenate([zeros, middle], axis=1), main.bits),
    )


def summing(columns: int, group_size: int, slots: int) -> Kernel:
    """The product that sums an activation over each group: codes that mean one and zero.

    Args:
        columns: Width of the activation.
        group_size: Columns of a group.
        slots: Results; those beyond the number of groups are zero.
    """
    block = block_size(Grid(1, columns, 4, group_size))
    grid = Grid(slots, columns, 4, block)
    column = np.arange(columns)
    codes = np.full((slots, grid.groups * block), 8, np.uint8)
    codes[column // group_size, column] = 9
    packed = pack(codes.reshape(slots, grid.groups, block), grid)
    return Kernel(4, block, columns, packed, np.ones((slots, grid.groups), np.float32))


def _high(codes: Codes) -> Codes:
    return np.right_shift(codes, np.uint8(4), dtype=np.uint8)


def _low(codes: Codes) -> Codes:
    return np.bitwise_and(codes, np.uint8(15), dtype=np.uint8)


def _reach(base: int, count: int) -> float:
    """Largest magnitude that `count` balanced digits hold whatever the sign."""
    return float((base // 2 - 1) * (base**count - 1)) / (base - 1)


def _common_unit(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest power of two of which all values of a block are multiples."""
    mantissa, exponent = np.frexp(values)
    whole = (mantissa * 2.0**53).astype(np.int64)
    lowest = np.log2(np.maximum(whole & -whole, 1)).astype(np.int64) + exponent - 53
    power = np.where(values != 0, lowest, np.iinfo(np.int64).max).min(-1)
    power = np.where((values == 0).all(-1), 0, power)
    # Below the smallest normal float32 a scale would be flushed to zero.
    found: NDArray[np.float64] = np.ldexp(1.0, np.maximum(power, -126).astype(np.int32))
    return found


def _pack_row(zeros: Codes, bits: int) -> Codes:
    """Pack zero points row by row, each row a stream of bits of its own."""
    rows, count = zeros.shape
    width = -(-count * bits // 8) * 8 // bits
    padded = np.pad(zeros, ((0, 0), (0, width - count)))
    return pack(padded[:, None, :], Grid(rows, width, bits, width))[:, 0]
