"""The one layout of quantized weights: groups of codes, each with a scale and a zero.

A weight of `N` rows (outputs) and `K` columns (inputs) is cut along `K` into groups of `group_size`
columns; the last group is filled up where `K` does not divide. Each group holds

- `codes`: whole numbers `0 .. 2**bits - 1`, packed as one stream of bits, low bits first (for 2, 4 and 8
  bits the order of ONNX Runtime's `MatMulNBits`),
- `scales`: one float32,
- its zero, in one of three forms: none stored (*symmetric*: `2 ** (bits - 1)`), a whole number
  `zero_points` (uint8), or a float32 `offsets` that is added (the grids of GGUF's Q4_1 and K types).

The value of a code is, in float32 and in this order of operations,

    scale * (code - zero)         without or with a zero point
    scale * code + offset         with an offset

so that every engine that follows it holds the same numbers bit by bit. Nothing here needs torch.

Scales and offsets are float32 numbers in memory and in graphs. Where half precision holds all of an array exactly,
which `to_half` sees to, files store it in 16 bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lmopt.errors import CorruptArtifactError, InputError, UnsupportedOptionError
from lmopt.types import FloatArray

BITS: Final = range(2, 9)
"""Widths of a code."""

# Codes that are unpacked at once: their bits, a byte each, stay in a core's cache.
_CHUNK: Final = 1 << 19

# The smallest number that half precision holds with all its digits, and the largest at all.
_LEAST_HALF: Final = 2.0**-14
_MOST_HALF: Final = 65504.0

Codes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Grid:
    """Form of a quantized weight: all that is not an array.

    Attributes:
        rows: Outputs, `N`.
        columns: Inputs, `K`.
        bits: Width of a code, 2 to 8.
        group_size: Columns that share a scale; `group_size * bits` must be whole bytes.
        zero: `"symmetric"`, `"integer"` or `"offset"`.

    Raises:
        UnsupportedOptionError: A size is impossible.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    zero: str = "symmetric"

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_form(self.bits, self.group_size)
        if self.zero not in ZEROS:
            raise UnsupportedOptionError(f"zero is {self.zero!r}; expected one of {', '.join(ZEROS)}")
        if self.rows < 1 or self.columns < 1:
            raise UnsupportedOptionError(f"a weight of {self.rows} x {self.columns} values holds nothing")

    @property
    def groups(self) -> int:
        """Groups of a row, the padded one included."""
        return -(-self.columns // self.group_size)

    @property
    def midpoint(self) -> int:
        """The code that means zero in a symmetric group."""
        return 1 << (self.bits - 1)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each stored array, by name."""
        per_group = (self.rows, self.groups)
        found: dict[str, tuple[tuple[int, ...], str]] = {
            "codes": ((*per_group, self.group_size * self.bits // 8), "uint8"),
            "scales": (per_group, "float32"),
        }
        if self.zero != "symmetric":
            found[ZEROS[self.zero]] = (per_group, "uint8" if self.zero == "integer" else "float32")
        return found

    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return sum(
            int(np.prod(shape)) * (1 if dtype == "uint8" else 4) for shape, dtype in self.shapes().values()
        )


ZEROS: Final[Mapping[str, str]] = {"symmetric": "", "integer": "zero_points", "offset": "offsets"}
"""Forms of the zero, and the name of the array that holds it."""


def check_form(bits: int, group_size: int) -> None:
    """Refuse widths and group sizes that have no packed form.

    Raises:
        UnsupportedOptionError: The message says which are possible.
    """
    if type(bits) is not int or bits not in BITS:
        raise UnsupportedOptionError(
            f"bits is {bits!r}; expected a whole number from {BITS[0]} to {BITS[-1]}"
        )
    if type(group_size) is not int or group_size < 1 or group_size * bits % 8:
        raise UnsupportedOptionError(
            f"group_size is {group_size!r}; expected a positive whole number whose codes of {bits} bits fill "
            "bytes: any multiple of 8 does (32, 64 and 128 are usual)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedArray:
    """A quantized weight in NumPy.

    Attributes:
        grid: Its form.
        codes: `(rows, groups, group_size * bits / 8)` uint8, packed.
        scales: `(rows, groups)` float32.
        zero_points: `(rows, groups)` uint8, where `grid.zero` is `"integer"`.
        offsets: `(rows, groups)` float32, where it is `"offset"`.

    Raises:
        CorruptArtifactError: An array is missing, left over, misshapen, out of range or not finite.
    """

    grid: Grid
    codes: Codes
    scales: FloatArray
    zero_points: Codes | None = None
    offsets: FloatArray | None = None

    def __post_init__(self) -> None:
        """Check the arrays."""
        check_arrays(self.grid, self.arrays(), "a quantized weight")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The stored arrays by name."""
        every: dict[str, NDArray[Any] | None] = {
            "codes": self.codes, "scales": self.scales, "zero_points": self.zero_points, "offsets": self.offsets
        }  # fmt: skip
        return {name: array for name, array in every.items() if array is not None}

    def values(self) -> FloatArray:
        """Dequantize: `(rows, columns)` float32, by the rule at the head of this module."""
        grid = self.grid
        result = np.empty((grid.rows, grid.columns), np.float32)
        for part in _row_chunks(grid):
            scales = self.scales[part, :, None]
            codes = unpack(self.codes[part], grid).astype(np.float32)
            if self.offsets is not None:
                codes *= scales
                codes += self.offsets[part, :, None]
            else:
                zero = (
                    np.float32(grid.midpoint) if self.zero_points is None else self.zero_points[part, :, None]
                )
                codes -= zero
                codes *= scales
            result[part] = codes.reshape(len(codes), -1)[:, : grid.columns]
        return result

    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return self.grid.nbytes()


def stacked(parts: Sequence[QuantizedArray]) -> QuantizedArray:
    """Put the rows of weights of one form into one weight."""
    if len(parts) == 1:
        return parts[0]
    arrays = {name: np.concatenate([one.arrays()[name] for one in parts]) for name in parts[0].arrays()}
    return QuantizedArray(replace(parts[0].grid, rows=sum(one.grid.rows for one in parts)), **arrays)


def check_arrays(grid: Grid, arrays: Mapping[str, NDArray[Any]], what: str) -> None:
    """Check arrays against the form that they are said to have.

    Args:
        grid: The form.
        arrays: Arrays by name.
        what: Whose they are, for the message.

    Raises:
        CorruptArtifactError: See `QuantizedArray`.
    """
    shapes = grid.shapes()
    if arrays.keys() != shapes.keys():
        raise CorruptArtifactError(
            f"{what} with a zero of form {grid.zero!r} consists of {', '.join(shapes)}; given: "
            f"{', '.join(arrays) or 'nothing'}"
        )
    for name, (shape, dtype) in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != dtype:
            raise CorruptArtifactError(
                f"{name} of {what} is {array.dtype} of shape {array.shape}; its form ({grid.rows} x "
                f"{grid.columns}, {grid.bits} bits, groups of {grid.group_size}) needs {dtype} of shape {shape}"
            )
        if dtype == "float32" and not np.isfinite(array).all():
            raise CorruptArtifactError(f"{name} of {what} holds NaN or infinity")
        if name == "zero_points" and array.size and int(array.max()) >> grid.bits:
            raise CorruptArtifactError(f"{name} of {what} exceeds {2**grid.bits - 1}, the largest code")


def pack(codes: Codes, grid: Grid) -> Codes:
    """Pack `(rows, groups, group_size)` codes, a byte each, into a stream of bits."""
    if grid.bits == 8:
        return np.ascontiguousarray(codes)
    packed = np.empty((len(codes), grid.groups, grid.group_size * grid.bits // 8), np.uint8)
    for part in _row_chunks(grid, len(codes)):
        if grid.bits == 4:
            packed[part] = codes[part, :, 0::2] | codes[part, :, 1::2] << 4
        else:
            bits = np.unpackbits(codes[part, ..., None], axis=-1, count=grid.bits, bitorder="little")
            packed[part] = np.packbits(bits.reshape(*packed[part].shape[:2], -1), axis=-1, bitorder="little")
    return packed


def unpack(packed: Codes, grid: Grid) -> Codes:
    """Undo `pack`: `(rows, groups, group_size)` codes, a byte each."""
    if grid.bits == 8:
        return packed
    codes = np.empty((*packed.shape[:2], grid.group_size), np.uint8)
    if grid.bits == 4:
        np.bitwise_and(packed, 15, out=codes[..., 0::2])
        np.right_shift(packed, 4, out=codes[..., 1::2])
        return codes
    for part in _row_chunks(grid, len(packed)):
        bits = np.unpackbits(packed[part], axis=-1, bitorder="little").reshape(*codes[part].shape, grid.bits)
        codes[part] = np.packbits(bits, axis=-1, bitorder="little")[..., 0]
    return codes


def grouped(weight: FloatArray, grid: Grid) -> FloatArray:
    """Cut `(rows, columns)` into `(rows, groups, group_size)`; what fills the last group up is zero."""
    missing = grid.groups * grid.group_size - grid.columns
    padded = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
    return padded.reshape(len(weight), grid.groups, grid.group_size)


def to_half(numbers: FloatArray, *, scales: bool = True) -> FloatArray:
    """Round numbers to half precision, as float32; all codes must be chosen by what comes out.

    Numbers beyond its range stay as they are, all of the array, and so do scales that it would hold too coarsely,
    unless they are nothing beside the largest.

    Args:
        numbers: Scales, or offsets.
        scales: Whether they are scales: an offset near 0 needs no more digits than its neighbours have.
    """
    size = np.abs(numbers)
    most = float(size.max(initial=0))
    coarse = scales and bool(((size < _LEAST_HALF) & (size > most / 1024)).any())
    return numbers if coarse or most > _MOST_HALF else numbers.astype(np.float16).astype(np.float32)


def check_weight(weight: FloatArray, what: str) -> None:
    """Refuse what is no sound weight.

    Raises:
        InputError: It is no matrix, or holds NaN or infinity.
    """
    if weight.ndim != 2:
        raise InputError(f"{what} has shape {weight.shape}; a matrix (outputs, inputs) can be compressed")
    if not np.isfinite(weight).all():
        raise InputError(f"{what} holds NaN or infinity: the model is damaged before it is compressed")


def quantize(
    weight: FloatArray,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    half: bool = False,
    what: str = "the weight",
) -> QuantizedArray:
    """Round a weight to the nearest codes (round-to-nearest, RTN).

    Symmetric groups have the scale `-m / 2**(bits-1)`, `m` being the value of largest magnitude with
    its sign, which is thus met exactly (ONNX Runtime's and GGUF's Q4_0 rule: one more code than
    `max / (2**(bits-1) - 1)` uses). Other groups span `min(w, 0) .. max(w, 0)`, with a whole zero point.

    Args:
        weight: `(rows, columns)` float32.
        bits: Width of a code, 2 to 8.
        group_size: Columns that share a scale.
        symmetric: Whether zero is the middle code.
        half: Whether scales are rounded by `to_half`.
        what: Name for messages.

    Raises:
        InputError: The weight is no matrix, or holds NaN or infinity.
        UnsupportedOptionError: `bits` or `group_size` is impossible.
    """
    check_weight(weight, what)
    rows, columns = weight.shape
    grid = Grid(rows, columns, bits, group_size, "symmetric" if symmetric else "integer")
    codes = np.empty((rows, grid.groups, group_size), np.uint8)
    scales = np.empty((rows, grid.groups), np.float32)
    zero_points = None if symmetric else np.empty((rows, grid.groups), np.uint8)
    for part in _row_chunks(grid):
        groups = grouped(np.asarray(weight[part], np.float32), grid)
        lowest, highest = groups.min(-1), groups.max(-1)
        if zero_points is None:
            extreme = np.where(-lowest >= highest, lowest, highest)
            scale = extreme / np.float32(-grid.midpoint)
            scale = to_half(scale) if half else scale
            zero = np.float32(grid.midpoint)
        else:
            lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
            # In halves: the span of two finite floats may exceed the largest one.
            scale = (highest / 2 - lowest / 2) / np.float32((2**bits - 1) / 2)
            scale = to_half(scale) if half else scale
            zero = np.rint(np.divide(-lowest, scale, out=np.zeros_like(scale), where=scale != 0))[..., None]
            zero_points[part] = zero[..., 0]
        inverse = np.divide(
            1, scale, out=np.zeros_like(scale), where=np.abs(scale) > np.finfo(np.float32).tiny
        )
        scales[part] = np.where(inverse == 0, 0, scale)
        steps = np.rint(groups * inverse[..., None]) + zero
        codes[part] = np.clip(steps, 0, 2**bits - 1, out=steps)
    return QuantizedArray(grid, pack(codes, grid), scales, zero_points)


def _row_chunks(grid: Grid, rows: int | None = None) -> Iterator[slice]:
    """Cut rows so that their codes, a byte or a float each, stay small."""
    rows = grid.rows if rows is None else rows
    step = max(1, _CHUNK // (grid.groups * grid.group_size))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
