"""Attention and masks through which every Hugging Face decoder runs in lmopt.

transformers builds masks from the *slot* of a token in the cache, so padding between past and new
tokens shifts sliding windows, and each model repeats its key and value heads in memory. Here a mask
is built from token *positions* (the cumulative sum of `attention_mask`), so padding may lie
anywhere, and grouped heads are broadcast instead of copied. Both are registered through
transformers' own interfaces and switched on for the time of one call only.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from lmopt.backends.torch.multi_head import attend, is_one_operator

NAME = "lmopt"

# The switch is a field of a shared config: two threads must not flip it under each other.
_switch = threading.RLock()

# Arguments of an attention function that change nothing here: the mask already carries what they say.
_CARRIED_BY_MASK = frozenset(
    {
        "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "is_causal", "max_length_k",
        "max_length_q", "output_attentions", "position_embeddings", "position_ids", "sliding_window",
        "use_cache",
    }
)  # fmt: skip


def position_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """Build the mask that says which keys a query sees, from positions instead of slots.

    Args:
        batch_size: Number of rows.
        q_length: Number of new tokens.
        kv_length: Number of slots, past and new.
        mask_function: transformers' rule `(row, head, query position, key position) -> bool`:
            causal, sliding, chunked or a combination.
        attention_mask: `(batch, kv_length)` bool, slots that hold a token; all where `None`.
        device: Where to build it.

    Returns:
        `(batch, 1, q_length, kv_length)` bool, `True` where the key is seen.
    """
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    read = attention_mask.to(torch.int64).cumsum(-1)
    # Rules that know of padding at the left (chunked attention) take it off again; to all others a
    # row's positions mean the same wherever they start.
    position = read - 1 + (read == 0).to(torch.int64).sum(-1, keepdim=True)
    row = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, dtype=torch.int64, device=device)[:, None, None]
    query = position[:, kv_length - q_length :][:, None, :, None]
    key = position[:, None, None, :]
    seen = mask_function(row, head, query, key) & attention_mask[:, None, None, :].to(torch.bool)
    return seen.expand(batch_size, 1, q_length, kv_length)


def additive_position_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """Give `position_mask` as zeros and the lowest finite number, for attention that adds it.

    An encoder's tokens, and those that look at an encoder's, see each other whatever their positions: then it is
    `(batch, 1, 1, kv_length)`, or `None` where nothing is padding.
    """
    if mask_function is bidirectional_mask_function:
        if attention_mask is None:
            return None
        seen = attention_mask[:, None, None, :].to(torch.bool)
    else:
        seen = position_mask(batch_size, q_length, kv_length, mask_function, attention_mask, **kwargs)
    return torch.where(seen, torch.zeros((), dtype=dtype, device=seen.device), torch.finfo(dtype).min)


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with query heads grouped over their key-value head, copying no head.

    Args:
        module: Attention module, for models whose own function must be called instead.
        query: `(batch, heads, new, head_dim)`.
        key: `(batch, kv_heads, slots, head_dim)`.
        value: `(batch, kv_heads, slots, value_dim)`.
        attention_mask: `(batch, 1, new, slots)`, additive; `None` where all is seen, as an encoder's tokens are.
        scaling: Factor of the scores, `head_dim ** -0.5` where `None`.
        softcap: Scores become `softcap * tanh(score / softcap)` (Gemma 2).
        s_aux: `(heads,)` logits of an attention sink (gpt-oss).
        **options: What else a model passes. If any of it could change the result, the model's own
            eager function is called.

    Returns:
        `(batch, new, heads, value_dim)`, and `None` in place of the weights.
    """
    if any(given is not None for name, given in options.items() if name not in _CARRIED_BY_MASK):
        own = sys.modules[type(module).__module__].eager_attention_forward
        if softcap is not None:
            options["softcap"] = softcap
        if s_aux is not None:
            options["s_aux"] = s_aux
        result: tuple[Tensor, Tensor | None] = own(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return result
    batch, heads, new, head_dim = query.shape
    kv_heads = key.shape[1]
    scaling = head_dim**-0.5 if scaling is None else scaling
    if softcap is None and s_aux is None and is_one_operator(query, key):
        return attend(query, key, value, attention_mask, scaling), None
    if softcap is None and s_aux is None and not torch.compiler.is_exporting():
        attended = functional.scaled_dot_product_attention(
            query, key, value, attention_mask, scale=scaling, enable_gqa=kv_heads != heads
        )
        return attended.transpose(1, 2), None
    if kv_heads == heads:
        scores = query @ key.transpose(-1, -2) * scaling
    else:
        query = query.reshape(batch, kv_heads, heads // kv_heads, new, head_dim)
        key, value = key[:, :, None], value[:, :, None]
        attention_mask = None if attention_mask is None else attention_mask[:, :, None]
        scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is None:
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    else:
        sink = s_aux.reshape(1, *scores.shape[1:-2], 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1].to(value.dtype)
    attended = weights @ value
    return attended.reshape(batch, heads, new, value.shape[-1]).transpose(1, 2), None


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, additive_position_mask)


@contextlib.contextmanager
def own_attention() -> Iterator[None]:
    """Keep every transformers model on its author's attention while the block runs."""
    with _switch:
        yield


@contextlib.contextmanager
def position_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run a transformers model with the attention and masks of this module, then restore its own."""
    with _switch, contextlib.ExitStack() as stack:
        if model._can_set_attn_implementation():
            for config in configs_of(model):
                stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation)
                config._attn_implementation_internal = NAME
        yield


def configs_of(model: PreTrainedModel) -> list[Any]:
    """List the distinct configs of a model and its parts."""
    found = {id(model.config): model.config}
    for part in model.modules():
        config = getattr(part, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())
