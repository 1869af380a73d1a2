"""Set the weights to zero that contribute least to their output (Wanda)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmopt.compression.layout import check_weight
from lmopt.compression.pruning import Prune, Sparsity, least, least_of_window, unread
from lmopt.compression.statistics import Statistics
from lmopt.types import FloatArray


@dataclass(frozen=True, slots=True)
class Wanda(Prune):
    """Set weights to zero by magnitude times the norm of their input, compared within an output.

    References:
        Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
        arXiv:2306.11695, equation 1.
    """

    name: ClassVar[str] = "wanda"
    needs_texts: ClassVar[bool] = True
    reads_sources: ClassVar[bool] = True

    def apply(
        self, weight: FloatArray, form: Sparsity, name: str, statistics: Statistics | None = None
    ) -> FloatArray:
        """Prune one weight.

        Args:
            weight: `(rows, columns)` float32; it is only read.
            form: From `form`.
            name: Name of the weight, for messages.
            statistics: What the linear has read.

        Returns:
            `(rows, columns)` float32 with `round(sparsity * columns)` zeros in each row, or as many in each
            window.

        Raises:
            InputError: The weight holds NaN or infinity, the pattern does not divide it, or it has read nothing.
            ShapeError: The statistics are those of another linear.
        """
        check_weight(weight, name)
        if statistics is None:
            raise unread(name)
        statistics.check(weight.shape[1], name)
        scores = np.abs(weight) * np.sqrt(np.diagonal(statistics.gram))
        if form.pattern is not None:
            mask = least_of_window(scores, form, name)
        else:
            mask = least(scores, round(form.sparsity * weight.shape[1]))
        return np.where(mask, np.float32(0), weight)
