"""What probing found out about a model: plain facts, each with the evidence already checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation of the last axis.

    Attributes:
        kind: `"rms"` divides by the root mean square; `"layer"` takes the mean off first.
        gain: `(width,)` factors.
        bias: `(width,)` or `None`.
        epsilon: Added to the mean square.
    """

    kind: Literal["rms", "layer"]
    gain: Tensor
    bias: Tensor | None
    epsilon: float

    def compute(self, x: Tensor) -> Tensor:
        """Compute it in float32, as ONNX Runtime does, and give it in the type of `x`."""
        wide = x.float()
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon) * self.gain.float()
        if self.bias is not None:
            wide = wide + self.bias.float()
        return wide.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product.

    Attributes:
        stored_transposed: Whether the weight is `(in, out)`.
        emits_itself: Whether the part writes its own operator (a quantized linear).
    """

    stored_transposed: bool = False
    emits_itself: bool = False


@dataclass(frozen=True, slots=True)
class Rotary:
    """Tables of a rotation by position.

    Attributes:
        cos: `(positions, size / 2)`, of which `size` entries of each head turn.
        sin: As `cos`.
        interleaved: Whether neighbours turn together, not the two halves.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of an operator's output something is made of, in order."""

    index: Tensor
    whole: bool


@dataclass(frozen=True, slots=True)
class Source:
    """Where queries, keys or values come from: columns of a linear, perhaps normalised by head.

    Attributes:
        path: The part whose output they are.
        columns: Which of its columns.
        head_norm: Path of the norm that each head then goes through.
    """

    path: str
    columns: Columns
    head_norm: str | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Entries of a head.
        scale: Factor of the scores.
        window: Keys that a query sees, itself included; `None` for all.
        softcap: Bound of the scores, `None` for none.
        sink: `(heads,)` logits of an attention sink.
        rotary: Rotation that the operator does; `None` where there is none or the trace has it.
        sources: Of query, key and value; `None` where they are traced.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    sink: Tensor | None
    rotary: Rotary | None
    sources: tuple[Source | None, Source | None, Source | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What each part of a model becomes.

    Attributes:
        layers: Attention layers by their number in the cache.
        linears: Linear parts by path.
        norms: Normalising parts by path.
        activations: Kinds of activation by path.
        rotaries: Paths of the parts that make rotary angles.
        head: Path of the part that makes the logits, where known.
    """

    layers: Mapping[int, Layer]
    linears: Mapping[str, Linear]
    norms: Mapping[str, Norm]
    activations: Mapping[str, str]
    rotaries: tuple[str, ...] = ()
    head: str | None = None
