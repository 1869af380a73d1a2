"""Attention of an encoder-decoder as one operator of ONNX Runtime.

`MultiHeadAttention` never writes the scores of a whole source down where no mask is in the way, and takes keys and
values as caches hold them. In a trace the graph still appends to the cache, as in the portable dialect; afterwards
`lmopt.backends.torch.fused.appending` lets the operator do that, and keep to what may be seen.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from lmopt.backends.torch.lowering import dialect

_reads_source: ContextVar[bool] = ContextVar("lmopt_reads_source", default=False)


@contextlib.contextmanager
def reading_source() -> Iterator[None]:
    """Let keys and values leave as linears make them while the block runs: an encoder caches none."""
    token = _reads_source.set(True)
    try:
        yield
    finally:
        _reads_source.reset(token)


def is_one_operator(query: Tensor, key: Tensor) -> bool:
    """Whether this attention leaves as one operator: in a trace for ONNX Runtime, where heads share nothing."""
    return torch.compiler.is_exporting() and dialect() == "onnxruntime" and query.shape[1] == key.shape[1]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Write the operator.

    Args:
        query: `(batch, heads, new, head_dim)`.
        key: `(batch, heads, slots, head_dim)`.
        value: `(batch, heads, slots, value_dim)`.
        mask: Added to the scores, `(batch or 1, heads or 1, new or 1, slots)`; `None` where all is seen.
        scaling: Factor of the scores.

    Returns:
        `(batch, new, heads, value_dim)`.
    """
    batch, heads, new, _ = query.shape
    if mask is not None:
        mask = mask.expand(mask.shape[0], mask.shape[1], new, key.shape[2])
    width = value.shape[-1]
    both = [_flat(key), _flat(value)] if _reads_source.get() else [key, value]
    attended: Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [_flat(query), *both, None, None, mask],
        {"num_heads": heads, "scale": scaling},
        dtype=query.dtype,
        shape=[batch, new, heads * width],
        version=1,
    )
    return attended.view(batch, new, heads, width)


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
