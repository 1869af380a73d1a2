"""Rows of packed codes as other libraries store them, and the layout's own.

compressed-tensors, GPTQ and AWQ pack codes into 32-bit words, low bits first. Read as bytes in little-endian
order, a row of words is the very stream of bits that `lmopt.compression.layout` stores: what differs is
which axis runs along the words, and where a group begins. So weights are re-arranged here, never computed
anew.
"""

from typing import Final

import numpy as np
from torch import Tensor

from lmopt.compression.layout import Codes, Grid, QuantizedArray, pack, unpack
from lmopt.errors import CorruptArtifactError, UnsupportedError, UnsupportedOptionError
from lmopt.types import FloatArray

# A group that spans a whole row is rounded up to this: whole bytes, and a block of ONNX Runtime's kernel.
_WHOLE_ROW: Final = 16

_SCALES: Final = ("torch.float16", "torch.bfloat16", "torch.float32")


def words(length: int, bits: int) -> int:
    """Count the 32-bit words that hold `length` codes."""
    return -(-length * bits // 32)


def read_words(tensor: Tensor, shape: tuple[int, int], what: str) -> Codes:
    """Give a matrix of 32-bit words as bytes, `(rows, 4 * words)`, lowest first.

    Args:
        tensor: The stored tensor.
        shape: What it must be.
        what: Its name for the message.

    Raises:
        CorruptArtifactError: It has another type or shape.
    """
    if str(tensor.dtype) != "torch.int32" or tuple(tensor.shape) != shape:
        raise CorruptArtifactError(
            f"{what} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}; its model and its "
            f"quantization_config need int32 of shape {shape}"
        )
    return np.ascontiguousarray(tensor.numpy().astype("<i4", copy=False)).view(np.uint8)


def read_scales(tensor: Tensor, shape: tuple[int, int], what: str) -> FloatArray:
    """Widen scales to float32, which is exact.

    Raises:
        CorruptArtifactError: They have another type or shape.
    """
    if str(tensor.dtype) not in _SCALES or tuple(tensor.shape) != shape:
        raise CorruptArtifactError(
            f"{what} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}; expected float16, "
            f"bfloat16 or float32 of shape {shape}"
        )
    widened: FloatArray = tensor.float().numpy()
    return widened


def unpack_stream(stream: Codes, count: int, bits: int) -> Codes:
    """Unpack the first `count` codes of each row: `(rows, bytes)` to `(rows, count)`."""
    form = _row_of_words(len(stream), count, bits)
    wanted = form.group_size * bits // 8
    stream = np.pad(stream[:, :wanted], ((0, 0), (0, max(0, wanted - stream.shape[1]))))
    return unpack(stream[:, None, :], form)[:, 0, :count]


def pack_stream(codes: Codes, bits: int) -> Codes:
    """Pack rows of codes into whole 32-bit words: `(rows, count)` to `(rows, 4 * words)`."""
    rows, count = codes.shape
    form = _row_of_words(rows, count, bits)
    padded = np.pad(codes, ((0, 0), (0, form.group_size - count)))
    return pack(padded[:, None, :], form)[:, 0, : 4 * words(count, bits)]


def _row_of_words(rows: int, count: int, bits: int) -> Grid:
    """Form of a row that is one group: of whole words, whatever the width."""
    whole = -(-count // 32) * 32
    return Grid(rows, whole, bits, whole)


def whole_row(columns: int) -> int:
    """Size of a group that takes a whole row."""
    return -(-columns // _WHOLE_ROW) * _WHOLE_ROW


def from_stream(
    stream: Codes,
    columns: int,
    bits: int,
    group_size: int,
    scales: FloatArray,
    zero_points: Codes | None,
    where: str,
) -> QuantizedArray:
    """Make a weight of a stream of codes.

    Args:
        stream: `(rows, bytes)` uint8.
        columns: Codes of a row.
        bits: Width of a code.
        group_size: Columns that share a scale.
        scales: `(rows, groups)` float32.
        zero_points: `(rows, groups)` uint8; `None`, or the middle code everywhere, is symmetric.
        where: Name for messages.

    Raises:
        UnsupportedError: The layout has no such groups.
        CorruptArtifactError: A scale is not finite.
    """
    if zero_points is not None and (zero_points == 1 << (bits - 1)).all():
        zero_points = None
    zero = "symmetric" if zero_points is None else "integer"
    try:
        grid = Grid(len(stream), columns, bits, group_size, zero)
    except UnsupportedOptionError as error:
        raise UnsupportedError(f"{where} has groups that lmopt's layout cannot hold: {error}") from error
    missing = grid.groups * group_size - columns
    if missing:
        # What fills the last group up means zero, as in weights that lmopt quantizes.
        last = (
            np.full((grid.rows, 1), grid.midpoint, np.uint8) if zero_points is None else zero_points[:, -1:]
        )
        codes = np.concatenate(
            [unpack_stream(stream, columns, bits), np.repeat(last, missing, axis=1)], axis=1
        )
        packed = pack(codes.reshape(grid.rows, grid.groups, group_size), grid)
    else:
        packed = np.ascontiguousarray(stream[:, : columns * bits // 8])
        packed = packed.reshape(grid.rows, grid.groups, group_size * bits // 8)
    zeros = None if zero_points is None else np.ascontiguousarray(zero_points)
    try:
        return QuantizedArray(grid, packed, np.ascontiguousarray(scales), zeros)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"{where} is damaged: {error}") from error
