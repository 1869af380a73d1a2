"""Which dialect a module is being traced for.

A module that is more than its arithmetic (a quantized linear, say) can leave as one operator of the
engine instead of the many that torch would trace. It asks `dialect()` in its forward, and writes the
operator with `torch.onnx.ops.symbolic`. Everywhere else the answer is `None` and it computes.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

Dialect = Literal["portable", "onnxruntime"]

_dialect: ContextVar[Dialect | None] = ContextVar("lmopt_dialect", default=None)


def dialect() -> Dialect | None:
    """Name the dialect that this thread is tracing for, `None` outside of a trace."""
    return _dialect.get()


@contextlib.contextmanager
def tracing_for(name: Dialect) -> Iterator[None]:
    """Let `dialect()` answer `name` in this thread while the block runs."""
    token = _dialect.set(name)
    try:
        yield
    finally:
        _dialect.reset(token)
