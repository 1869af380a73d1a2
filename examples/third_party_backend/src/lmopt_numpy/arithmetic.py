"""Element-wise operators and reductions."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmopt.types import AnyArray

_ERF = np.frompyfunc(math.erf, 1, 1)  # exact, and short; a polynomial would be faster


def erf(x: AnyArray) -> AnyArray:
    """Error function."""
    return _ERF(x).astype(x.dtype)


def gelu(x: AnyArray, *, approximate: str = "none") -> AnyArray:
    """Gaussian error linear unit."""
    if approximate == "tanh":
        inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
        return (0.5 * x * (1 + np.tanh(inner))).astype(x.dtype)
    return (0.5 * x * (1 + erf(x * np.float32(1 / math.sqrt(2))))).astype(x.dtype)


def sigmoid(x: AnyArray) -> AnyArray:
    """Logistic function; where `exp` overflows, its infinity gives the right 0."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def divide(a: AnyArray, b: AnyArray) -> AnyArray:
    """Division; of integers it cuts towards zero, as C does."""
    if np.issubdtype(a.dtype, np.integer):
        return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)
    return a / b


def power(a: AnyArray, b: AnyArray) -> AnyArray:
    """Power, in the type of the base."""
    return np.power(a, b).astype(a.dtype)


def modulo(a: AnyArray, b: AnyArray, *, fmod: int = 0) -> AnyArray:
    """Remainder, with the divisor's sign or (`fmod`) the dividend's."""
    return np.fmod(a, b) if fmod else np.mod(a, b)


def clip(x: AnyArray, low: AnyArray | None = None, high: AnyArray | None = None) -> AnyArray:
    """Bound values."""
    return np.clip(x, low, high)


def softplus(x: AnyArray) -> AnyArray:
    """`log(1 + exp(x))`."""
    return np.logaddexp(x, 0).astype(x.dtype)


def leaky_relu(x: AnyArray, *, alpha: float = 0.01) -> AnyArray:
    """Rectifier with a slope below zero."""
    return np.where(x < 0, x * np.asarray(alpha, x.dtype), x)


def softmax(x: AnyArray, *, axis: int = -1) -> AnyArray:
    """Exponentials that sum to 1 along an axis."""
    weights = np.exp(x - x.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def log_softmax(x: AnyArray, *, axis: int = -1) -> AnyArray:
    """Logarithm of `softmax`."""
    shifted = x - x.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def _reduce(how: Callable[..., AnyArray]) -> Callable[..., AnyArray]:
    def compute(
        x: AnyArray,
        over: AnyArray | None = None,
        *,
        axes: Sequence[int] | None = None,  # where operators before opset 18 have them
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> AnyArray:
        chosen = tuple(int(axis) for axis in (over if over is not None else axes or ()))
        if not chosen and noop_with_empty_axes:
            return x
        return np.asarray(how(x, axis=chosen or None, keepdims=bool(keepdims))).astype(x.dtype)

    return compute


def _arg(how: Callable[..., AnyArray]) -> Callable[..., AnyArray]:
    def compute(x: AnyArray, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> AnyArray:
        if select_last_index:
            return x.shape[axis] - 1 - how(np.flip(x, axis), axis=axis, keepdims=bool(keepdims))
        return np.asarray(how(x, axis=axis, keepdims=bool(keepdims)), np.int64)

    return compute


def _fold(how: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arrays: functools.reduce(how, arrays)


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Abs": np.abs, "Add": np.add, "And": np.logical_and, "ArgMax": _arg(np.argmax),
    "ArgMin": _arg(np.argmin), "Ceil": np.ceil, "Clip": clip, "Cos": np.cos, "Div": divide,
    "Equal": np.equal, "Erf": erf, "Exp": np.exp, "Floor": np.floor, "Gelu": gelu,
    "Greater": np.greater, "GreaterOrEqual": np.greater_equal, "IsInf": np.isinf, "IsNaN": np.isnan,
    "LeakyRelu": leaky_relu, "Less": np.less, "LessOrEqual": np.less_equal, "Log": np.log,
    "LogSoftmax": log_softmax, "Max": _fold(np.maximum), "Min": _fold(np.minimum), "Mod": modulo,
    "Mul": np.multiply, "Neg": np.negative, "Not": np.logical_not, "Or": np.logical_or, "Pow": power,
    "Reciprocal": lambda x: 1 / x, "ReduceMax": _reduce(np.max), "ReduceMean": _reduce(np.mean),
    "ReduceMin": _reduce(np.min), "ReduceProd": _reduce(np.prod), "ReduceSum": _reduce(np.sum),
    "Relu": lambda x: np.maximum(x, 0), "Round": np.round, "Sigmoid": sigmoid, "Sign": np.sign,
    "Sin": np.sin, "Softmax": softmax, "Softplus": softplus, "Sqrt": np.sqrt, "Sub": np.subtract,
    "Sum": _fold(np.add), "Tanh": np.tanh, "Where": np.where, "Xor": np.logical_xor,
}  # fmt: skip
