"""Activation-aware weight quantization (AWQ)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmopt.compression.grid_search import encode, search_groups
from lmopt.compression.layout import QuantizedArray, check_weight
from lmopt.compression.overrides import Part
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
        fold_only: Move the scales into what comes before the linears, and leave the weights in float for the next
            step: `[AWQ(group_size=64, fold_only=True), GPTQ(group_size=64)]`. Bits and group size are then
            those that the scales are chosen for.
    """

    name: ClassVar[str] = "awq"
    needs_texts: ClassVar[bool] = True
    reads_sources: ClassVar[bool] = True

    n_grid: int = 20
    fold_only: bool = False

    def __post_init__(self) -> None:
        """Check every field."""
        # A dataclass with slots is a new class, which the short form of super() does not know.
        super(AWQ, self).__post_init__()
        if type(self.n_grid) is not int or self.n_grid < 1:
            raise UnsupportedOptionError(f"n_grid is {self.n_grid!r}; expected a whole number of at least 1")
        if not isinstance(self.fold_only, bool):
            raise UnsupportedOptionError(f"fold_only is {self.fold_only!r}; expected True or False")

    def form(self, path: str, part: Part) -> Form | None:
        """Say how a weight is quantized; see `Quantize.form`. Where nothing is, only linears can be scaled."""
        return None if self.fold_only and part != "linear" else Quantize.form(self, path, part)

    def scales(
        self, weights: Sequence[FloatArray], forms: Sequence[Form], statistics: Statistics
    ) -> FloatArray | None:
        """Choose the scales of linears that read one tensor; see `search_scales`."""

        def rounded(weight: FloatArray, number: int) -> QuantizedArray:
            form = forms[number]
            return Quantize.apply(self, weight, form, "")

        return search_scales(weights, statistics, rounded, n_grid=self.n_grid)

    def apply(  # type: ignore[override]  # with fold_only, which Mixed refuses, a pruner's kind of result
        self, weight: FloatArray, form: Form, name: str, statistics: Statistics | None = None
    ) -> QuantizedArray | FloatArray:
        """Quantize one weight, whose scales have been moved into it; see `Quantize.apply`.

        The ranges of groups are searched (the paper's clipping), each column counted by its input. With
        `fold_only` the weight is given as it is.
        """
        if self.fold_only:
            return weight
        if statistics is None:
            return Quantize.apply(self, weight, form, name)
        check_weight(weight, name)
        statistics.check(weight.shape[1], name)
        grid = form.grid(len(weight), weight.shape[1])
        scales, zero_points = search_groups(weight, grid, np.diagonal(statistics.gram), half=form.half)
        return encode(weight, grid, scales, zero_points)
