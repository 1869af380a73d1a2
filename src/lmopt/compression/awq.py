"""Activation-aware weight quantization (AWQ)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmopt.compression.grid_search import encode, search_groups
from lmopt.compression.layout import QuantizedArray, check_weight, quantize
from lmopt.compression.round_to_nearest import Form, Quantize
from lmopt.compression.scaling import search_scales
from lmopt.compression.statistics import Statistics
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray


@dataclass(frozen=True, slots=True)
class AWQ(Quantize):
    """Scale inputs by a power of their size, so that the columns that matter round finely, then round.

    Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978.

    Attributes:
        n_grid: Powers `alpha` that are tried, 0 to 1 in so many steps; the paper's 20.
    """

    name: ClassVar[str] = "awq"
    needs_texts: ClassVar[bool] = True

    n_grid: int = 20

    def __post_init__(self) -> None:
        """Check every field."""
        # A dataclass with slots is a new class, which the short form of super() does not know.
        super(AWQ, self).__post_init__()
        if type(self.n_grid) is not int or self.n_grid < 1:
            raise UnsupportedOptionError(f"n_grid is {self.n_grid!r}; expected a whole number of at least 1")

    def scales(
        self, weights: Sequence[FloatArray], forms: Sequence[Form], statistics: Statistics
    ) -> FloatArray | None:
        """Choose the scales of linears that read one tensor; see `search_scales`."""

        def rounded(weight: FloatArray, number: int) -> QuantizedArray:
            form = forms[number]
            return quantize(weight, form.bits, form.group_size, symmetric=form.symmetric)

        return search_scales(weights, statistics, rounded, n_grid=self.n_grid)

    def apply(
        self, weight: FloatArray, form: Form, name: str, statistics: Statistics | None = None
    ) -> QuantizedArray:
        """Quantize one weight, whose scales have been moved into it; see `Quantize.apply`.

        The ranges of groups are searched (the paper's clipping), each column counted by its input.
        """
        if statistics is None:
            return quantize(weight, form.bits, form.group_size, symmetric=form.symmetric, what=name)
        check_weight(weight, name)
        statistics.check(weight.shape[1], name)
        grid = form.grid(len(weight), weight.shape[1])
        scales, zero_points = search_groups(weight, grid, np.diagonal(statistics.gram))
        return encode(weight, grid, scales, zero_points)
