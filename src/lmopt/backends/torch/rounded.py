"""Products of activations rounded to 8 bits with quantized weights, as ONNX Runtime's `MatMulNBits` computes them.

Each row of the activations, that is each token, is cut into blocks of columns; a block gets the scale
`max|x| / 127` and whole numbers `round(x / scale)`, half to even. Nothing is calibrated, and nothing of
one row depends on another. A block's products are sums of whole numbers below 2**24, thus exact in float32 in
whichever order they are added up; blocks are added up in the order of the columns. So a row gives the same
bits alone and among others.

Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339 (rounding by row); `accuracy_level=4` of `MatMulNBits`, level
`CompInt8` of MLAS (blocks and half to even).
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from lmopt.compression.layout import Grid

_MOST: Final = 127
# Blocks of the operator are powers of two from 16 to 256.
_SMALLEST: Final = 16
_LARGEST: Final = 256


def block_of(grid: Grid) -> int:
    """Columns that share a scale of the activations: the operator's block, or the group where it has none."""
    block = min(grid.group_size & -grid.group_size, _LARGEST)
    return block if block >= _SMALLEST else min(grid.group_size, _LARGEST)


def round_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Round activations to 8 bits.

    Args:
        x: `(..., columns)`, float.
        block: Columns of a block; a last one that is not full is filled up with zeros.

    Returns:
        Whole numbers from -127 to 127 as `(..., blocks, block)` float32, and scales `(..., blocks, 1)`.
    """
    missing = -x.shape[-1] % block
    padded = functional.pad(x.float(), (0, missing)) if missing else x.float()
    parts = padded.reshape(*padded.shape[:-1], -1, block)
    most = parts.abs().amax(-1, keepdim=True)
    scales = most / _MOST
    # A block of zeros stays one.
    inverse = torch.where(most > 0, _MOST / most, torch.zeros_like(most))
    return torch.round(parts * inverse), scales


def rounded(x: Tensor, block: int) -> Tensor:
    """Give activations the values that they have after rounding to 8 bits, in their own type and shape."""
    codes, scales = round_rows(x, block)
    return (codes * scales).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def multiply(x: Tensor, grid: Grid, codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Multiply rounded activations with a quantized weight.

    Args:
        x: `(..., columns)`, float.
        grid: Form of the weight.
        codes: `(rows, groups, group_size)` float32 whole numbers, the zero taken off.
        scales: `(rows, groups)` float32.
        offsets: `(rows, groups)` float32 that is added to each weight of a group, or `None`.

    Returns:
        `(..., rows)` in the type of `x`.
    """
    block = block_of(grid)
    rounded_x, scales_x = round_rows(x.flatten(0, -2), block)
    parts = grid.group_size // block
    weight = codes.reshape(len(codes), -1, block)
    result = x.new_zeros(len(rounded_x), grid.rows, dtype=torch.float32)
    # Of the last group there may be blocks that are all filling.
    for number in range(rounded_x.shape[1]):
        group = number // parts
        whole = rounded_x[:, number] @ weight[:, number].t()
        result += whole.mul_(scales_x[:, number] * scales[:, group])
        if offsets is not None:
            sums = rounded_x[:, number].sum(-1, keepdim=True)
            result += (sums * scales_x[:, number]) * offsets[:, group]
    return result.reshape(*x.shape[:-1], grid.rows).to(x.dtype)
