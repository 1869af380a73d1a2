"""The Hessian of a linear's output error, made fit to be inverted; for GPTQ and SparseGPT."""

import warnings
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray

# Below this width a triangle is inverted whole.
_SMALL: Final = 128
# Where a Hessian without damping turns out singular, damping starts here.
_FIRST: Final = 1e-4


class DampedWarning(UserWarning):
    """A Hessian was singular and needed more damping than was asked for."""


def check_damping(damping: float, shrinkage: float) -> None:
    """Refuse impossible shares.

    Raises:
        UnsupportedOptionError: One is out of range.
    """
    for name, value, most in (("damping", damping, np.inf), ("shrinkage", shrinkage, 1)):
        if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value <= most:
            raise UnsupportedOptionError(
                f"{name} is {value!r}; expected a number from 0" + (f" to {most}" if most == 1 else "")
            )
    if not np.isfinite(damping):
        raise UnsupportedOptionError("damping is infinite; a share of the mean diagonal such as 0.1 is meant")


def is_dead(gram: FloatArray) -> NDArray[np.bool_]:
    """Say which inputs were never anything but zero: `(K,)`."""
    dead: NDArray[np.bool_] = np.diagonal(gram) <= 0
    return dead


def damped(gram: FloatArray, damping: float, shrinkage: float, name: str) -> tuple[FloatArray, FloatArray]:
    """Give a Hessian that can be inverted, and the factor of its inverse.

    A Gram matrix of few tokens claims correlations that other texts do not have. What makes up for errors by
    them does harm there, so they are believed in part only: `(1 - shrinkage) H + shrinkage diag(H)` (Ledoit
    and Wolf 2004), and `damping` times the mean of the diagonal is added to it (Frantar 2022, section 3.3).
    Inputs that were always zero count as much as the others do on average, and depend on none.

    Args:
        gram: `(K, K)` float32, mean of `x x^T`, its columns in the order of the work.
        damping: lambda of the papers, at least 0.
        shrinkage: Share of the correlations that is not believed, 0 to 1.
        name: Name of the weight, for the warning.

    Returns:
        `H`, `(K, K)` float32, and `U`, `(K, K)` float32, upper triangular with `H^-1 = U^T U`: row `j` of `U`
        over `U[j, j]` says how the columns after `j` make up for an error in `j` when those before are fixed.

    Warns:
        DampedWarning: More damping was needed.
    """
    hessian: NDArray[np.float64] = gram.astype(np.float64)
    hessian *= 1 - shrinkage
    diagonal = np.diagonal(gram).astype(np.float64)
    dead = is_dead(gram)
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    hessian[dead] = 0
    hessian[:, dead] = 0
    diagonal[dead] = mean
    asked = damping
    while True:
        np.fill_diagonal(hessian, diagonal + damping * mean)
        try:
            # Factored from the last column on: H = M M^T with an upper M, whose inverse is U.
            lower = np.linalg.cholesky(hessian[::-1, ::-1])
            factor = _inverse_of_lower(lower)[::-1, ::-1].astype(np.float32)
        except np.linalg.LinAlgError:
            factor = None
        # Of a matrix that is singular but for rounding, the factor is noise, if it is finite at all.
        if factor is not None and np.isfinite(factor).all() and _is_sound(lower, hessian):
            break
        damping = max(10 * damping, _FIRST)
    if damping != asked:
        warnings.warn(
            f"{name}: its inputs on the calibration texts depend on each other (a singular Hessian); damping was "
            f"raised from {asked:g} to {damping:g}. More or more varied texts make it unnecessary",
            DampedWarning,
            stacklevel=3,
        )
    return hessian.astype(np.float32), np.ascontiguousarray(factor)


def _is_sound(lower: NDArray[Any], hessian: NDArray[Any]) -> bool:
    """Say whether what the others do not tell of an input stands out of the noise of float32 statistics."""
    unexplained = np.square(np.diagonal(lower)) / np.diagonal(hessian)[::-1]
    return bool(unexplained.min() > np.finfo(np.float32).eps)


def _inverse_of_lower(lower: NDArray[Any]) -> NDArray[Any]:
    """Invert a lower triangular matrix by halves; nearly all the work is matrix products."""
    size = len(lower)
    if size <= _SMALL:
        result: NDArray[Any] = np.tril(np.linalg.inv(lower))
        return result
    half = size // 2
    result = np.zeros_like(lower)
    result[:half, :half] = _inverse_of_lower(lower[:half, :half])
    result[half:, half:] = _inverse_of_lower(lower[half:, half:])
    result[half:, :half] = -(result[half:, half:] @ lower[half:, :half]) @ result[:half, :half]
    return result
