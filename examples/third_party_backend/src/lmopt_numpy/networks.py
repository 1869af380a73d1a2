"""Matrix products, normalisations and recurrent layers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmopt.errors import UnsupportedError
from lmopt.types import AnyArray
from lmopt_numpy.arithmetic import sigmoid


def gemm(
    a: AnyArray,
    b: AnyArray,
    c: AnyArray | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 (ONNX's spelling)
    transB: int = 0,  # noqa: N803
) -> AnyArray:
    """`alpha a b + beta c`."""
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else product * np.asarray(alpha, a.dtype)
    return product if c is None else product + (c if beta == 1 else c * np.asarray(beta, a.dtype))


def einsum(*arrays: AnyArray, equation: str) -> AnyArray:
    """Einstein's sum."""
    return np.einsum(equation, *arrays, optimize=True)


def layer_normalization(
    x: AnyArray,
    scale: AnyArray,
    bias: AnyArray | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> AnyArray:
    """Subtract the mean and divide by the deviation over the axes from `axis` on."""
    over = tuple(range(axis % x.ndim, x.ndim))
    centred = x - x.mean(over, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(over, keepdims=True) + np.asarray(epsilon, x.dtype))
    result = centred / deviation * scale
    return result if bias is None else result + bias


def rms_normalization(
    x: AnyArray, scale: AnyArray, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> AnyArray:
    """Divide by the root of the mean square over the axes from `axis` on."""
    over = tuple(range(axis % x.ndim, x.ndim))
    return x / np.sqrt(np.square(x).mean(over, keepdims=True) + np.asarray(epsilon, x.dtype)) * scale


def lstm(
    x: AnyArray,
    w: AnyArray,
    r: AnyArray,
    b: AnyArray | None = None,
    sequence_lens: AnyArray | None = None,
    initial_h: AnyArray | None = None,
    initial_c: AnyArray | None = None,
    p: AnyArray | None = None,
    *,
    hidden_size: int,
    **options: Any,
) -> tuple[AnyArray, AnyArray, AnyArray]:
    """One forward LSTM layer over `(sequence, batch, input)`; gates in the order i, o, f, c."""
    _only_defaults("LSTM", options, sequence_lens, p, w)
    gates = x @ w[0].T + (0 if b is None else b[0, : 4 * hidden_size] + b[0, 4 * hidden_size :])
    zero = np.zeros((x.shape[1], hidden_size), x.dtype)
    h = zero if initial_h is None else initial_h[0]
    c = zero if initial_c is None else initial_c[0]
    steps = []
    for gate in gates:
        i, o, f, g = np.split(gate + h @ r[0].T, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        steps.append(h)
    return np.stack(steps)[:, None], h[None], c[None]


def gru(
    x: AnyArray,
    w: AnyArray,
    r: AnyArray,
    b: AnyArray | None = None,
    sequence_lens: AnyArray | None = None,
    initial_h: AnyArray | None = None,
    *,
    hidden_size: int,
    linear_before_reset: int = 0,
    **options: Any,
) -> tuple[AnyArray, AnyArray]:
    """One forward GRU layer over `(sequence, batch, input)`; gates in the order z, r, h."""
    _only_defaults("GRU", options, sequence_lens, None, w)
    wb, rb = (0, np.zeros(3 * hidden_size, x.dtype)) if b is None else np.split(b[0], 2)
    gates = x @ w[0].T + wb
    h = np.zeros((x.shape[1], hidden_size), x.dtype) if initial_h is None else initial_h[0]
    n = 2 * hidden_size
    steps = []
    for gate in gates:
        z, reset = np.split(sigmoid(gate[:, :n] + h @ r[0, :n].T + rb[:n]), 2, axis=-1)
        inner = (
            reset * (h @ r[0, n:].T + rb[n:]) if linear_before_reset else (reset * h) @ r[0, n:].T + rb[n:]
        )
        h = (1 - z) * np.tanh(gate[:, n:] + inner) + z * h
        steps.append(h)
    return np.stack(steps)[:, None], h[None]


def _only_defaults(
    kind: str,
    options: dict[str, Any],
    lengths: AnyArray | None,
    peepholes: AnyArray | None,
    weights: AnyArray,
) -> None:
    """Refuse variants that would otherwise be computed wrongly without a word."""
    plain: dict[str, Sequence[Any]] = {"direction": ("forward",), "layout": (0,), "input_forget": (0,)}
    strange = [name for name, value in options.items() if value not in plain.get(name, ())]
    if strange or lengths is not None or peepholes is not None or len(weights) != 1:
        raise UnsupportedError(
            f"backend 'numpy' runs plain forward {kind} layers only, not with "
            f"{strange or 'lengths or peepholes'}"
        )


NETWORKS: dict[str, Callable[..., Any]] = {
    "Dropout": lambda x, *_, **__: x, "Einsum": einsum, "GRU": gru, "Gemm": gemm, "LSTM": lstm,
    "LayerNormalization": layer_normalization, "MatMul": np.matmul, "RMSNormalization": rms_normalization,
}  # fmt: skip
