"""Fit scales and zeros to a weight without any texts, by half-quadratic optimisation (HQQ)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Final, Literal

import numpy as np

from lmopt.compression.grid_search import encode, inverse
from lmopt.compression.layout import Grid, QuantizedArray, check_weight, grouped, quantize
from lmopt.compression.overrides import Part
from lmopt.compression.round_to_nearest import Form, Quantize
from lmopt.compression.statistics import Statistics
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray

# Weights that are worked on at once: with their codes and errors, they stay in a core's cache.
_CHUNK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class HQQ(Quantize):
    """Round to a grid that is fitted to the many small weights of a group rather than to its outliers.

    The error of a weight is split into a sparse part, found by shrinking (equation 4), and a rest, to which
    the zero, a float, is fitted in closed form (equation 6). Errors are counted in steps of the group, so that
    the fields mean the same in every model; the scale is fitted along with the zero; and of all iterations a group
    keeps the one with the least squared error, the first being round to nearest.

    Attributes:
        symmetric: Off here, since the zero is what the method is about. Where it is on, only scales are fitted,
            and a smaller error of the weights is no smaller loss of the model: the largest weights, which
            round to nearest meets, matter more than their number.
        p: Of the `l_p` norm that the sparse part is given, above 0 to 1.
        beta: How strongly both parts are held to the error; what exceeds about `beta ** (-1 / (2 - p))`
            steps counts as an outlier.
        kappa: Factor by which `beta` grows with each iteration, at least 1.
        iterations: Fits, one after the other.
        zero: `"offset"`, a float as in the paper, or `"integer"`, a whole number, which takes a byte less for
            each group and gains nothing over round to nearest. Without meaning where `symmetric` is on.

    Raises:
        UnsupportedOptionError: A value is impossible.

    References:
        Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
        https://mobiusml.github.io/hqq_blog/.
    """

    name: ClassVar[str] = "hqq"

    symmetric: bool = False
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    zero: Literal["integer", "offset"] = "offset"

    def __post_init__(self) -> None:
        """Check every field."""
        Quantize.__post_init__(self)
        for name, valid, told in (
            ("p", _is_number(self.p) and 0 < self.p <= 1, "a number above 0, at most 1"),
            ("beta", _is_number(self.beta) and 0 < self.beta < np.inf, "a number above 0"),
            ("kappa", _is_number(self.kappa) and 1 <= self.kappa < np.inf, "a number from 1"),
            (
                "iterations",
                type(self.iterations) is int and self.iterations >= 1,
                "a whole number from 1",
            ),
            ("zero", self.zero in ("integer", "offset"), "'integer' or 'offset'"),
        ):
            if not valid:
                raise UnsupportedOptionError(f"{name} is {getattr(self, name)!r}; expected {told}")

    def form(self, path: str, part: Part) -> Form | None:
        """Say how a weight is quantized; see `Quantize.form`."""
        form = Quantize.form(self, path, part)
        return None if form is None else replace(form, offset=self.zero == "offset")

    def apply(
        self, weight: FloatArray, form: Form, name: str, statistics: Statistics | None = None
    ) -> QuantizedArray:
        """Quantize one weight; see `Quantize.apply`. Statistics are not looked at.

        Raises:
            InputError: The weight holds NaN or infinity.
        """
        check_weight(weight, name)
        plain = quantize(weight, form.bits, form.group_size, symmetric=form.symmetric)
        rows, columns = weight.shape
        kind = "symmetric" if form.symmetric else self.zero
        grid = Grid(rows, columns, form.bits, form.group_size, kind)
        # Columns that are not there have no say in what fits.
        real = grouped(np.ones((1, columns), np.float32), grid)[0]
        scales = plain.scales.copy()
        zeros = np.full_like(scales, grid.midpoint) if plain.zero_points is None else plain.zero_points
        zeros = zeros.astype(np.float32)
        step = max(1, _CHUNK // (grid.groups * grid.group_size))
        for first in range(0, rows, step):
            part = slice(first, first + step)
            self._fit(grouped(weight[part], grid), real, scales[part], zeros[part], grid)
        return encode(weight, grid, scales, None if form.symmetric else zeros, half=form.half)

    def _fit(
        self, groups: FloatArray, real: FloatArray, scales: FloatArray, zeros: FloatArray, grid: Grid
    ) -> None:
        """Change the scales and zeros of some rows' groups for better ones."""
        top = np.float32(2**grid.bits - 1)
        unit = np.abs(scales)[..., None]
        per_unit = inverse(unit)
        scale, zero, beta = scales.copy(), zeros.copy(), self.beta
        least = np.full(scales.shape, np.inf, np.float32)
        members = np.maximum(real.sum(-1), 1)
        for _ in range(self.iterations + 1):
            codes = groups * inverse(scale)[..., None]
            codes += zero[..., None]
            np.clip(np.rint(codes, out=codes), 0, top, out=codes)
            centred = codes - zero[..., None]
            error = groups - centred * scale[..., None]
            error *= per_unit
            error *= real
            loss = np.einsum("ngk,ngk->ng", error, error)
            better = loss < least
            for kept, new in ((least, loss), (scales, scale), (zeros, zero)):
                np.copyto(kept, new, where=better)
            target = groups - _shrink(error, beta, self.p) * unit
            if grid.zero != "symmetric":
                shift = (codes - target * inverse(scale)[..., None]) * real
                zero = shift.sum(-1) / members
                if grid.zero == "integer":
                    zero = np.clip(np.rint(zero), 0, top)
                centred = codes - zero[..., None]
            centred *= real
            over, of = (np.einsum("ngk,ngk->ng", centred, one) for one in (target, centred))
            fitted = np.divide(over, of, out=scale.copy(), where=of > 0)
            scale = np.where(fitted == 0, scale, fitted)
            beta *= self.kappa


def _shrink(error: FloatArray, beta: float, p: float) -> FloatArray:
    """Give the sparse part of an error: `sign(x) max(0, |x| - |x|^(p-1) / beta)`."""
    size = np.abs(error)
    # What is 0 shrinks to 0; the smallest number stands in for it, since 0 has no negative power.
    power = np.power(np.maximum(size, np.finfo(np.float32).tiny), np.float32(p - 1))
    sparse: FloatArray = np.copysign(np.maximum(size - power / np.float32(beta), 0), error)
    return sparse


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
