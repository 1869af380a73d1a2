"""Set the smallest weights to zero."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmopt.compression.layout import check_weight
from lmopt.compression.pruning import Prune, Sparsity, least, least_of_window
from lmopt.compression.statistics import Statistics
from lmopt.types import FloatArray


@dataclass(frozen=True, slots=True)
class Magnitude(Prune):
    """Set the weights of smallest magnitude in each matrix to zero; no calibration.

    References:
        Han et al. 2015, arXiv:1506.02626; per matrix, as the baseline of Sun et al. 2023, arXiv:2306.11695.
    """

    name: ClassVar[str] = "magnitude"
    needs_texts: ClassVar[bool] = False

    def apply(
        self, weight: FloatArray, form: Sparsity, name: str, statistics: Statistics | None = None
    ) -> FloatArray:
        """Prune one weight.

        Args:
            weight: `(rows, columns)` float32; it is only read.
            form: From `form`.
            name: Name of the weight, for messages.
            statistics: Not looked at.

        Returns:
            `(rows, columns)` float32 with `round(sparsity * size)` zeros, or as many in each window.

        Raises:
            InputError: The weight holds NaN or infinity, or the pattern does not divide it.
        """
        check_weight(weight, name)
        scores = np.abs(weight)
        if form.pattern is not None:
            mask = least_of_window(scores, form, name)
        else:
            mask = least(scores.reshape(1, -1), round(form.sparsity * scores.size)).reshape(scores.shape)
        return np.where(mask, np.float32(0), weight)
