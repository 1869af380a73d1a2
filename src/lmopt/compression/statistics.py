"""What the calibrated methods know of a linear's inputs.

One pass over the calibration texts is enough for every method: GPTQ and SparseGPT need the second moments of
the inputs (`gram`), Wanda their diagonal, AWQ the mean and SmoothQuant the largest magnitude of each input.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmopt.errors import DtypeError, InputError, ShapeError
from lmopt.types import FloatArray

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What a linear with `K` inputs has read during calibration.

    Attributes:
        gram: `(K, K)` float32, mean of `x x^T` over the tokens; the Hessian of GPTQ and SparseGPT is twice
            this, and the factor matters to neither.
        mean_abs: `(K,)` float32, mean of `|x|`.
        max_abs: `(K,)` float32, largest `|x|`.
        tokens: Number of tokens, at least 1.

    Raises:
        DtypeError: An array is not float32.
        ShapeError: The shapes do not belong together.
        InputError: There are no tokens, or a number is NaN or infinite.
    """

    gram: FloatArray
    mean_abs: FloatArray
    max_abs: FloatArray
    tokens: int
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the arrays."""
        columns = len(self.gram) if self.gram.ndim else 0
        expected = {"gram": (columns, columns), "mean_abs": (columns,), "max_abs": (columns,)}
        for name, shape in expected.items():
            array: NDArray[Any] = getattr(self, name)
            if array.dtype != np.float32:
                raise DtypeError(f"{name} of the statistics is {array.dtype}; expected float32")
            if array.shape != shape:
                raise ShapeError(
                    f"{name} of the statistics has shape {array.shape}; expected {shape}, because the first axis "
                    f"of gram counts {columns} inputs"
                )
            if not np.isfinite(array).all():
                raise InputError(
                    f"{name} of the statistics holds NaN or infinity: an activation of the model overflows on the "
                    "calibration texts. Calibrate the model in float32"
                )
        if self.tokens < 1:
            raise InputError("the statistics count no token; give calibration texts that reach the layer")

    @classmethod
    def of(cls, inputs: FloatArray) -> "Statistics":
        """Read all inputs at once.

        Args:
            inputs: `(tokens, K)` float32.

        Raises:
            ShapeError, InputError: As for the class.

        Example:
            >>> Statistics.of(np.array([[1, -2], [3, 0]], np.float32)).gram.tolist()
            [[5.0, -1.0], [-1.0, 2.0]]
        """
        if inputs.ndim != 2:
            raise ShapeError(f"the inputs have shape {inputs.shape}; expected (tokens, inputs of the linear)")
        tokens = len(inputs)
        if not tokens:
            raise InputError("the statistics count no token; give calibration texts that reach the layer")
        size = np.abs(inputs)
        with np.errstate(invalid="ignore", over="ignore"):  # what comes of it is refused
            gram = inputs.T @ inputs / np.float32(tokens)
        return cls(gram, size.mean(0, dtype=np.float64).astype(np.float32), size.max(0), tokens)

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """Give what follows from the statistics alone, made at the first call.

        Linears that read one tensor have one object, and so share a factored Hessian.

        Args:
            key: Names what is made, with all that it depends on beside the statistics.
            make: Makes it.
        """
        if key not in self._made:
            self._made[key] = make()
        made: _Made = self._made[key]
        return made

    def forget(self) -> None:
        """Let go of what `once` has made."""
        self._made.clear()

    @property
    def columns(self) -> int:
        """Number of inputs, `K`."""
        return len(self.gram)

    def check(self, columns: int, name: str) -> None:
        """Refuse statistics of another linear.

        Args:
            columns: Inputs of the weight.
            name: Name of the weight, for the message.

        Raises:
            ShapeError: The numbers of inputs differ.
        """
        if columns != self.columns:
            raise ShapeError(
                f"{name} has {columns} inputs and the statistics {self.columns}: they were gathered elsewhere"
            )
