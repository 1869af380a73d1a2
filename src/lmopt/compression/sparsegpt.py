"""Set weights to zero and let the others of their row make up for it (SparseGPT)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lmopt.compression.hessian import check_damping, damped, is_dead
from lmopt.compression.layout import check_weight
from lmopt.compression.pruning import Prune, Sparsity, check_window, least, unread
from lmopt.compression.statistics import Statistics
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray


@dataclass(frozen=True, slots=True)
class SparseGPT(Prune):
    """Go through the columns, set weights to zero where that costs least, and correct the columns after.

    The corrections hold for inputs that correlate as those of the calibration texts do: ahead of `Wanda` on texts
    of the same kind, not on others.

    Attributes:
        damping: lambda, share of the mean diagonal of the Hessian that is added to it. The paper's 0.01 fits
            the calibration texts more closely and other texts less.
        shrinkage: Share of the inputs' correlations that is not believed, 0 (the paper) to 1 (no correction
            at all). Correlations of some thousand tokens are noise in part.
        block_size: `B_s`, columns whose zeros are chosen together, all rows against each other.

    Raises:
        UnsupportedOptionError: A value is impossible.

    References:
        Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1.
    """

    name: ClassVar[str] = "sparsegpt"
    needs_texts: ClassVar[bool] = True
    reads_sources: ClassVar[bool] = True

    damping: float = 0.1
    shrinkage: float = 0.2
    block_size: int = 128

    def __post_init__(self) -> None:
        """Check every field."""
        Prune.__post_init__(self)
        check_damping(self.damping, self.shrinkage)
        if type(self.block_size) is not int or self.block_size < 1:
            raise UnsupportedOptionError(f"block_size is {self.block_size!r}; expected a whole number from 1")

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
            `(rows, columns)` float32. Each block of columns has its share of the zeros, `round(sparsity * size)`
            in all; or each window of a row has its own. Columns whose input is always zero are zero besides.

        Raises:
            InputError: The weight holds NaN or infinity, the pattern does not divide it, or it has read nothing.
            ShapeError: The statistics are those of another linear.

        Warns:
            DampedWarning: The Hessian was singular and more damping was needed.
        """
        check_weight(weight, name)
        if statistics is None:
            raise unread(name)
        rows, columns = weight.shape
        statistics.check(columns, name)
        check_window(columns, form, name)
        _, factor = statistics.once(
            (SparseGPT.name, self.damping, self.shrinkage),
            lambda: damped(statistics.gram, self.damping, self.shrinkage, name),
        )
        pivots = np.diagonal(factor)
        # Each column is a row in memory.
        work: FloatArray = np.ascontiguousarray(weight.T, np.float32)
        work[is_dead(statistics.gram)] = 0
        block = self.block_size
        if form.pattern is not None:  # a window lies in one block
            block += -block % form.window()[1]
        zeros = 0
        for first in range(0, columns, block):
            last = min(columns, first + block)
            mask: NDArray[np.bool_] = np.zeros((last - first, rows), np.bool_)
            if form.pattern is None:
                scores = np.square(work[first:last] / pivots[first:last, None])
                # Counted from the start, so that the blocks' rounding does not add up.
                count = round(form.sparsity * rows * last) - zeros
                zeros += count
                mask = least(scores.reshape(1, -1), count).reshape(scores.shape)
            errors = np.empty_like(work[first:last])
            for column in range(first, last):
                here = column - first
                if form.pattern is not None and column % form.window()[1] == 0:
                    kept, of = form.window()
                    scores = np.square(work[column : column + of] / pivots[column : column + of, None])
                    mask[here : here + of] = least(scores.T, of - kept).T
                errors[here] = np.where(mask[here], work[column], 0) / pivots[column]
                work[column][mask[here]] = 0
                later = slice(column + 1, last)
                work[later] -= factor[column, later, None] * errors[here]
            work[last:] -= factor[first:last, last:].T @ errors
        return np.ascontiguousarray(work.T)
