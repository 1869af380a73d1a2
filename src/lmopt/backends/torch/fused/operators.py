"""ONNX Runtime's operators, each in two forms: emitted into a trace, or computed by torch.

The computed form serves the self-check that is run before the costly trace: a twin whose parts have
been replaced must still say what the model says. Operators of the domain `lmopt` exist between the
trace and the saved graph only.
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lmopt.backends.torch.fused.plan import Columns, Layer, Norm, Rotary

MICROSOFT: Final = "com.microsoft"
LINEAR: Final = "lmopt::Linear"
COLUMNS: Final = "lmopt::Columns"
LAST_TOKENS: Final = "lmopt::LastTokens"
# Attention of encoder-decoders, and where its inputs stand; its query is the first.
MULTI_HEAD: Final = "MultiHeadAttention"
KEY, VALUE, PADDING, BIAS, CACHE = 1, 2, 4, 5, 6

# transformers' activations by the operator that computes them; alpha 1 makes QuickGelu a SiLU.
ACTIVATIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "silu": (f"{MICROSOFT}::QuickGelu", {"alpha": 1.0}),
    "gelu_tanh": (f"{MICROSOFT}::FastGelu", {}),
    "gelu": ("Gelu", {}),
}


def emitting() -> bool:
    """Say whether a trace is being recorded."""
    return torch.compiler.is_exporting()


def emit(name: str, inputs: list[Tensor | None], shape: Any, dtype: torch.dtype, **attributes: Any) -> Tensor:
    """Write one operator with one output into the trace."""
    result: Tensor = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=1)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, stored_transposed: bool) -> Tensor:
    """Multiply by a weight `(out, in)`, or `(in, out)` where it is stored transposed."""
    if not emitting():
        matrix = weight.t() if stored_transposed else weight
        return functional.linear(x, matrix, bias)
    width = weight.shape[1 if stored_transposed else 0]
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return emit(LINEAR, [*inputs], [*x.shape[:-1], width], x.dtype, stored_transposed=int(stored_transposed))


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """Normalise the last axis."""
    if not emitting():
        return norm.compute(x)
    attributes: dict[str, Any] = {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1}
    if norm.kind == "rms":
        return emit("SimplifiedLayerNormalization", [x, norm.gain], x.shape, x.dtype, **attributes)
    inputs = [x, norm.gain] if norm.bias is None else [x, norm.gain, norm.bias]
    return emit("LayerNormalization", [*inputs], x.shape, x.dtype, **attributes)


def activate(x: Tensor, kind: str) -> Tensor:
    """Apply an activation of `ACTIVATIONS`."""
    if emitting():
        name, attributes = ACTIVATIONS[kind]
        return emit(name, [x], x.shape, x.dtype, **attributes)
    return compute_activation(x, kind)


def compute_activation(x: Tensor, kind: str) -> Tensor:
    """Compute an activation of `ACTIVATIONS`."""
    if kind == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def last_tokens(x: Tensor) -> Tensor:
    """Keep as many last positions of `(batch, sequence, hidden)` as the engine asks for."""
    return emit(LAST_TOKENS, [x], x.shape, x.dtype) if emitting() else x


def take_columns(x: Tensor, columns: Columns) -> Tensor:
    """Pick columns of a linear's output; the exporter picks rows of its weight instead."""
    if columns.whole:
        return x
    if not emitting():
        return x[..., columns.index]
    index = columns.index.tolist()
    return emit(COLUMNS, [x], [*x.shape[:-1], len(index)], x.dtype, index=index)


def rotate(x: Tensor, position_ids: Tensor, rotary: Rotary) -> Tensor:
    """Rotate `(batch, heads, tokens, head_dim)` by position, as GroupQueryAttention does."""
    cos, sin = (table.float()[position_ids][:, None] for table in (rotary.cos, rotary.sin))
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    if rotary.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    joined = torch.stack(parts, dim=-1).flatten(-2) if rotary.interleaved else torch.cat(parts, dim=-1)
    return torch.cat([joined.to(x.dtype), rest], dim=-1)


class Rows(NamedTuple):
    """How long the rows of a traced call are.

    Attributes:
        lengths: `(batch,)` int32, tokens of each row after the call, less one.
        total: int32 number, the most tokens of a row after the call.
        new: `(batch,)` int32, tokens of each row in the call. Without it the operator refuses
            several tokens on a past for more than one row.
    """

    lengths: Tensor
    total: Tensor
    new: Tensor


class Past(NamedTuple):
    """What an attention layer has read: `(batch, kv_heads, past, head_dim)` keys and values."""

    key: Tensor
    value: Tensor
    rows: Rows | None


def group_query_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: Layer, past: Past
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend from `(batch, new, heads * head_dim)` to the past and the new keys of a layer.

    Returns:
        What was attended to, as `query`, and the layer's keys and values after it.
    """
    if not emitting():
        return _attend(query, key, value, layer, past)
    attributes: dict[str, Any] = {
        "num_heads": layer.heads,
        "kv_num_heads": layer.kv_heads,
        "scale": layer.scale,
    }
    tables: list[Tensor | None] = [None, None]
    if layer.rotary is not None:
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(layer.rotary.interleaved)}
        tables = [layer.rotary.cos, layer.rotary.sin]
    if layer.window is not None:
        attributes["local_window_size"] = layer.window
    if layer.softcap is not None:
        attributes["softcap"] = float(layer.softcap)
    # In between: position ids, a bias, the sink, and scales and norms of other engines.
    assert past.rows is not None
    lengths, total, new = past.rows
    inputs = [query, key, value, past.key, past.value, lengths, total, *tables]
    inputs += [None, None, layer.sink, None, None, None, None, new]
    attended, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        f"{MICROSOFT}::GroupQueryAttention",
        inputs,
        attributes,
        dtypes=[query.dtype] * 3,
        shapes=[query.shape, past.key.shape, past.value.shape],
        version=1,
    )
    return attended, present_key, present_value


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layer: Layer, past: Past
) -> tuple[Tensor, Tensor, Tensor]:
    batch, new, _ = query.shape
    q, k, v = (x.view(batch, new, -1, layer.head_dim).transpose(1, 2) for x in (query, key, value))
    read = past.key.shape[2]
    place = torch.arange(read + new, device=q.device)
    if layer.rotary is not None:
        positions = place[read:][None].expand(batch, -1)
        q, k = rotate(q, positions, layer.rotary), rotate(k, positions, layer.rotary)
    keys, values = torch.cat([past.key, k], dim=2), torch.cat([past.value, v], dim=2)
    groups = layer.heads // layer.kv_heads
    k, v = (x.repeat_interleave(groups, dim=1).float() for x in (keys, values))
    scores = q.float() @ k.transpose(-1, -2) * layer.scale
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    back = place[read:, None] - place
    scores = scores.masked_fill((back < 0) | (back >= (layer.window or read + new)), -torch.inf)
    if layer.sink is not None:
        sink = layer.sink.float().reshape(1, -1, 1, 1).expand(batch, -1, new, 1)
        scores = torch.cat([scores, sink], dim=-1)
    attended = scores.softmax(-1)[..., : read + new] @ v
    return attended.to(query.dtype).transpose(1, 2).reshape(batch, new, -1), keys, values
