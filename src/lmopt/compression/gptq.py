"""Choose codes so that each column makes up for the errors of those before it (GPTQ)."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from lmopt.compression.grid_search import inverse, search_groups
from lmopt.compression.hessian import check_damping, damped, is_dead
from lmopt.compression.layout import Codes, Grid, QuantizedArray, check_weight, pack, stacked, to_half
from lmopt.compression.round_to_nearest import Form, Quantize
from lmopt.compression.statistics import Statistics
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray

# Numbers of the rows' systems of equations that are held at once.
_CHUNK: Final = 1 << 22
# Numbers of a weight that are worked on at once: rows do not depend on each other, and a head has many.
_AT_ONCE: Final = 1 << 23

_Factored = tuple[NDArray[np.intp], FloatArray, FloatArray, FloatArray]
"""Order of the work, the Hessian in this order and in the weight's, and its factor."""


@dataclass(frozen=True, slots=True)
class GPTQ(Quantize):
    """Round column by column; columns not yet rounded take up the error as the inputs' correlations allow.

    A weight without statistics (an embedding, a head that is tied to one) is rounded to the nearest code.

    Attributes:
        damping: lambda, share of the mean diagonal of the Hessian that is added to it. The paper's 0.01 fits
            the calibration texts more closely and other texts less.
        shrinkage: Share of the inputs' correlations that is not believed, 0 (the paper) to 1 (no correction
            at all). Correlations of some thousand tokens are noise in part.
        act_order: Whether columns with large inputs come first. Scales belong to a column's place, not to
            its turn, so that the layout needs no index of groups.
        block_size: Columns that are worked on before the others are updated; a matter of speed alone.
        search: Whether scales and zero points are searched with each column counted by its input
            (`grid_search`), or span the group's extremes as in the paper.
        refine: How often, after that, scales are fitted to the codes by least squares over a row, and codes
            to the scales by coordinate descent (Behdin et al. 2023, QuantEase, arXiv:2309.01885). 0 is GPTQ.

    Raises:
        UnsupportedOptionError: A value is impossible.

    References:
        Frantar et al. 2022, arXiv:2210.17323.
    """

    name: ClassVar[str] = "gptq"
    needs_texts: ClassVar[bool] = True
    reads_sources: ClassVar[bool] = True

    damping: float = 0.1
    shrinkage: float = 0.2
    act_order: bool = True
    block_size: int = 128
    search: bool = True
    refine: int = 2

    def __post_init__(self) -> None:
        """Check every field."""
        Quantize.__post_init__(self)
        check_damping(self.damping, self.shrinkage)
        for name, least in (("block_size", 1), ("refine", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UnsupportedOptionError(f"{name} is {value!r}; expected a whole number from {least}")

    def apply(
        self, weight: FloatArray, form: Form, name: str, statistics: Statistics | None = None
    ) -> QuantizedArray:
        """Quantize one weight; see `Quantize.apply`.

        Raises:
            InputError: The weight holds NaN or infinity.
            ShapeError: The statistics are those of another linear.

        Warns:
            DampedWarning: The Hessian was singular and more damping was needed.
        """
        if statistics is None:
            return Quantize.apply(self, weight, form, name)
        check_weight(weight, name)
        statistics.check(weight.shape[1], name)
        factored = statistics.once(
            (GPTQ.name, self.damping, self.shrinkage, self.act_order),
            lambda: self._factored(statistics.gram, name),
        )
        step = max(1, _AT_ONCE // weight.shape[1])
        return stacked(
            [
                self._rows(weight[start : start + step], form, name, statistics.gram, factored)
                for start in range(0, len(weight), step)
            ]
        )

    def _rows(
        self, weight: FloatArray, form: Form, name: str, gram: FloatArray, factored: _Factored
    ) -> QuantizedArray:
        """Quantize some rows."""
        grid = form.grid(*weight.shape)
        # Whatever an input that is always zero is multiplied by: 0 leaves the group's range to the others.
        weight = np.where(is_dead(gram), np.float32(0), weight)
        if self.search:
            # The damped diagonal, so that the grid suits what the codes are then chosen by.
            importance = np.diagonal(gram) + np.float32(self.damping) * np.diagonal(gram).mean()
            scales, zero_points = search_groups(weight, grid, importance, half=form.half)
        else:
            plain = Quantize.apply(self, weight, form, name)
            scales, zero_points = plain.scales, plain.zero_points
        order, hessian, in_place, factor = factored
        work = _Columns(weight, grid, scales, zero_points, order, half=form.half)
        work.round_all(factor, self.block_size)
        if self.refine:
            work.fit_scales(in_place)
            for _ in range(self.refine):
                work.descend(hessian, self.block_size)
                work.fit_scales(in_place)
        return work.result(zero_points)

    def draft(self) -> "GPTQ":
        """Give a quicker step; see `Quantize.draft`."""
        return replace(self, search=False, refine=0)

    def _factored(self, gram: FloatArray, name: str) -> _Factored:
        """Give the order of the work, the Hessian in this order and in the weight's, and its factor."""
        order = np.argsort(-np.diagonal(gram), kind="stable") if self.act_order else np.arange(len(gram))
        hessian, factor = damped(gram[np.ix_(order, order)], self.damping, self.shrinkage, name)
        places = np.argsort(order)
        return order, hessian, hessian[np.ix_(places, places)], factor


class _Columns:
    """A weight's columns in the order of the work, each a row in memory, with their codes less the zero."""

    def __init__(
        self,
        weight: FloatArray,
        grid: Grid,
        scales: FloatArray,
        zero_points: Codes | None,
        order: NDArray[np.intp],
        *,
        half: bool,
    ) -> None:
        self.grid, self.order, self.half = grid, order, half
        self.group = order // grid.group_size
        self.weight = np.ascontiguousarray(weight.T[order], np.float32)
        self.codes: FloatArray = np.zeros_like(self.weight)
        # One row a group, like the columns.
        self.scales: FloatArray = np.ascontiguousarray(scales.T)
        zeros = np.full_like(scales, grid.midpoint) if zero_points is None else zero_points
        self.least: FloatArray = -np.ascontiguousarray(zeros.T, np.float32)
        self.most: FloatArray = self.least + np.float32(2**grid.bits - 1)

    def values(self) -> FloatArray:
        """What the codes stand for."""
        return self.codes * self.scales[self.group]

    def round_all(self, factor: FloatArray, block_size: int) -> None:
        """Choose every code, columns in order (algorithm 1 of the paper)."""
        weight, inverses = self.weight.copy(), inverse(self.scales)
        for first in range(0, len(weight), block_size):
            last = min(len(weight), first + block_size)
            errors = np.empty_like(weight[first:last])
            for column in range(first, last):
                group = self.group[column]
                code = np.rint(weight[column] * inverses[group])
                np.clip(code, self.least[group], self.most[group], out=self.codes[column])
                errors[column - first] = weight[column] - self.codes[column] * self.scales[group]
                errors[column - first] /= factor[column, column]
                later = slice(column + 1, last)
                weight[later] -= factor[column, later, None] * errors[column - first]
            weight[last:] -= factor[first:last, last:].T @ errors

    def descend(self, hessian: FloatArray, block_size: int) -> None:
        """Give each column in turn the codes that are best while all others stay."""
        errors, inverses = self.weight - self.values(), inverse(self.scales)
        for first in range(0, len(errors), block_size):
            last = min(len(errors), first + block_size)
            slopes = hessian[first:last] @ errors
            for column in range(first, last):
                group = self.group[column]
                old = self.codes[column] * self.scales[group]
                target = old + slopes[column - first] / hessian[column, column]
                code = np.rint(target * inverses[group])
                np.clip(code, self.least[group], self.most[group], out=self.codes[column])
                change = self.codes[column] * self.scales[group] - old
                errors[column] -= change
                slopes[column - first :] -= hessian[column:last, column, None] * change

    def fit_scales(self, hessian: FloatArray) -> None:
        """Give each row the scales, all groups at once, that are best for its codes.

        Args:
            hessian: Its columns where the weight has them, not in the order of the work.
        """
        groups, rows = self.scales.shape
        size, places = self.grid.group_size, np.argsort(self.order)
        step = max(1, _CHUNK // max(groups * groups, len(self.weight)))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            codes, errors = (one[:, part][places] for one in (self.codes, self.weight))
            errors -= codes * np.repeat(self.scales[:, part], size, axis=0)[: len(codes)]
            slope = _sums((hessian @ errors) * codes, size)
            matrix: NDArray[Any] = np.empty((codes.shape[1], groups, groups), np.float64)
            for group in range(groups):
                first = group * size
                own = slice(first, first + size)
                curved = _sums((hessian[first:, own] @ codes[own]) * codes[first:], size)
                matrix[:, group, group:] = matrix[:, group:, group] = curved.T
            # Keeps a group whose codes are all zero, and thus its scale, out of it.
            diagonal = np.einsum("rgg->rg", matrix)
            diagonal += 1e-6 * diagonal.mean(-1, keepdims=True) + np.finfo(np.float32).tiny
            change = np.linalg.solve(matrix, slope.T[..., None])[..., 0].T
            # Of a step that solves a row's equations, this is twice the gain; noise alone makes it negative.
            gain = (change * slope).sum(0)
            self.scales[:, part] += np.where(np.isfinite(gain) & (gain > 0), change, 0).astype(np.float32)
        if self.half:
            self.scales = to_half(self.scales)

    def result(self, zero_points: Codes | None) -> QuantizedArray:
        """Put the columns back into their places."""
        grid = self.grid
        codes = np.empty((grid.columns, grid.rows), np.uint8)
        codes[self.order] = self.codes - self.least[self.group]
        scales = np.ascontiguousarray(self.scales.T)
        missing = grid.groups * grid.group_size - grid.columns
        # What fills the last group up is its zero, as everywhere.
        filling = np.repeat(-self.least[-1][:, None], missing, axis=1).astype(np.uint8)
        full = np.concatenate([codes.T, filling], axis=1).reshape(grid.rows, grid.groups, grid.group_size)
        return QuantizedArray(grid, pack(np.ascontiguousarray(full), grid), scales, zero_points)


def _sums(columns: FloatArray, size: int) -> NDArray[np.float64]:
    """Sum up the columns of each group: `(groups, rows)`."""
    starts = np.arange(0, len(columns), size)
    return np.add.reduceat(columns, starts, axis=0, dtype=np.float64)
