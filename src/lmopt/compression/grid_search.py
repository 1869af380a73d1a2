"""Choose scales and zero points of groups by the error that they leave, not by the group's extremes.

To clip a group's few largest values costs there and gives every other value a finer grid. How far to go is tried
out: a handful of shrunken ranges a group, each followed by the scale that is best for its codes (least squares),
with every column counted as much as its input is large.
"""

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np

from lmopt.compression.layout import (
    Codes,
    Grid,
    QuantizedArray,
    check_weight,
    grouped,
    pack,
    quantize,
    to_half,
)
from lmopt.errors import ShapeError, UnsupportedOptionError
from lmopt.types import FloatArray

SHRINK: Final = (1.1, 1.04, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Shares of a group's range that are tried: a trained weight loses least near 0.9, one with outliers near 0.3."""

# Weights that are tried at once: with their codes and errors, they stay in a core's cache.
_CHUNK: Final = 1 << 16


def search_groups(
    weight: FloatArray,
    grid: Grid,
    importance: FloatArray,
    *,
    shrink: Sequence[float] = SHRINK,
    rounds: int = 2,
    half: bool = False,
) -> tuple[FloatArray, Codes | None]:
    """Find a scale (and zero point) for every group with little `sum_k importance_k (w_k - w'_k)^2`.

    Never worse than the plain grid of `layout.quantize`, which is the first that is tried. With the diagonal
    of the Gram matrix as importance it is the error of the linear's output where inputs are uncorrelated.

    Args:
        weight: `(rows, columns)` float32.
        grid: The form; its zero is symmetric or integer.
        importance: `(columns,)` float32, not negative.
        shrink: Shares of a group's range to try.
        rounds: How often codes and scales are fitted to each other after that.
        half: Whether scales are rounded to half precision (`layout.to_half`).

    Returns:
        `(rows, groups)` float32 scales and, where the zero is integer, uint8 zero points.

    Raises:
        InputError: The weight is no matrix, or holds NaN or infinity.
        ShapeError: Weight, grid and importance do not belong together.
        UnsupportedOptionError: The grid's zero is an offset.
    """
    check_weight(weight, "the weight")
    if weight.shape != (grid.rows, grid.columns) or importance.shape != (grid.columns,):
        raise ShapeError(
            f"the weight has shape {weight.shape} and the importance {importance.shape}; expected "
            f"{(grid.rows, grid.columns)} and {(grid.columns,)}"
        )
    if grid.zero == "offset":
        raise UnsupportedOptionError(
            "groups with an offset are not searched; use the zero 'symmetric' or 'integer'"
        )
    plain = quantize(weight, grid.bits, grid.group_size, symmetric=grid.zero == "symmetric")
    scales, zero_points = plain.scales.copy(), None if plain.zero_points is None else plain.zero_points.copy()
    padded = grouped(np.asarray(importance[None], np.float32), grid)[0]
    step = max(1, _CHUNK // (grid.groups * grid.group_size))
    for first in range(0, grid.rows, step):
        rows = slice(first, first + step)
        zeros = np.full_like(scales[rows], grid.midpoint)
        if zero_points is not None:
            zeros[:] = zero_points[rows]
        search = _Search(grouped(weight[rows], grid), padded, scales[rows], zeros, 2**grid.bits - 1)
        search.run(shrink, rounds, symmetric=zero_points is None)
        scales[rows] = search.scales
        if zero_points is not None:
            zero_points[rows] = search.zeros
    return to_half(scales) if half else scales, zero_points


def encode(
    weight: FloatArray,
    grid: Grid,
    scales: FloatArray,
    zeros: FloatArray | Codes | None = None,
    *,
    half: bool = False,
) -> QuantizedArray:
    """Round a weight to the nearest codes of given scales and zeros.

    Args:
        weight: `(rows, columns)` float32.
        grid: The form.
        scales: `(rows, groups)` float32; a group whose scale is 0 becomes zero.
        zeros: `(rows, groups)`, the code that means zero: whole where the grid's zero is integer, any number
            where it is an offset, `None` where it is symmetric.
        half: Whether scales and offsets are rounded to half precision (`layout.to_half`).
    """
    if half:
        scales = to_half(scales)
    codes = np.empty((grid.rows, grid.groups, grid.group_size), np.uint8)
    places = np.full_like(scales, grid.midpoint) if zeros is None else np.asarray(zeros, np.float32)
    offsets = -scales * places
    if half and grid.zero == "offset":
        offsets = to_half(offsets, scales=False)
        places = -offsets * inverse(scales)
    step = max(1, _CHUNK // (grid.groups * grid.group_size))
    for first in range(0, grid.rows, step):
        rows = slice(first, first + step)
        steps = grouped(weight[rows], grid) * inverse(scales[rows])[..., None]
        # A whole zero is added after rounding, as `layout.quantize` does it.
        whole = np.zeros_like(places[rows]) if grid.zero == "offset" else places[rows]
        steps += (places[rows] - whole)[..., None]
        np.rint(steps, out=steps)
        steps += whole[..., None]
        codes[rows] = np.clip(steps, 0, 2**grid.bits - 1, out=steps)
    packed = pack(codes, grid)
    if grid.zero == "offset":
        return QuantizedArray(grid, packed, scales, offsets=offsets)
    return QuantizedArray(grid, packed, scales, None if zeros is None else places.astype(np.uint8))


def inverse(scales: FloatArray) -> FloatArray:
    """Invert scales; those too small to be inverted become 0, so that their codes are the zero's."""
    large = np.abs(scales) > np.finfo(np.float32).tiny
    return np.divide(1, scales, out=np.zeros_like(scales), where=large)


class _Search:
    """The best scales and zeros so far of some rows' groups, and buffers for the next try."""

    def __init__(
        self, groups: FloatArray, importance: FloatArray, scales: FloatArray, zeros: FloatArray, top: int
    ) -> None:
        self.groups, self.importance, self.top = groups, importance, top
        self.scales, self.zeros = scales.copy(), zeros
        self._error = np.full_like(scales, np.inf)
        self._codes, self._other = np.empty_like(groups), np.empty_like(groups)

    def run(self, shrink: Sequence[float], rounds: int, *, symmetric: bool) -> None:
        """Try the plain grid, every share of it, and then fit codes and scales to each other."""
        plain, zeros = self.scales.copy(), self.zeros.copy()
        self._attempt(plain, zeros, fit=False)
        # A symmetric grid has one more code on one side, which may be either; a whole zero may move.
        signs, shifts = ((1, -1), (0,)) if symmetric else ((1,), (0, -1, 1))
        for share in shrink:
            for sign, shift in itertools.product(signs, shifts):
                self._attempt(
                    plain * np.float32(sign * share), np.clip(zeros + np.float32(shift), 0, self.top)
                )
        for _ in range(rounds):
            zeros = self.zeros.copy()
            for shift in shifts:
                self._attempt(self.scales, np.clip(zeros + np.float32(shift), 0, self.top))

    def _attempt(self, scales: FloatArray, zeros: FloatArray, fit: bool = True) -> None:
        """Keep a scale, or the one that fits its codes best, where that is better than any before."""
        codes, other = self._codes, self._other
        np.multiply(self.groups, inverse(scales)[..., None], out=codes)
        np.rint(codes, out=codes)
        np.clip(codes, -zeros[..., None], self.top - zeros[..., None], out=codes)
        # Weights near the largest float overflow here; their error is no number, and the try is not kept.
        with np.errstate(over="ignore", invalid="ignore"):
            if fit:
                np.multiply(codes, self.importance, out=other)
                over, of = (np.einsum("ngk,ngk->ng", other, one) for one in (self.groups, codes))
                scales = np.divide(over, of, out=scales.copy(), where=of > 0)
            np.multiply(codes, scales[..., None], out=other)
            other -= self.groups
            np.square(other, out=other)
            error = np.einsum("ngk,gk->ng", other, self.importance)
        better = error < self._error
        for kept, new in ((self._error, error), (self.scales, scales), (self.zeros, zeros)):
            np.copyto(kept, new, where=better)
