"""Where transformers hands attention and masks over to whoever watches the model.

The functions are registered once under a name of their own and find the watcher of their thread, so
that only the twin that is being probed or traced meets them.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lmopt.backends.torch.attention import configs_of

NAME: Final = "lmopt_fused"

MaskRule = Callable[..., Tensor]


class Watcher(Protocol):
    """What probing and lowering have in common."""

    def mask(self, rule: MaskRule, query: Tensor) -> Tensor | None:
        """See a mask's rule; return what attention layers are given for it."""
        ...

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """Attend over `(batch, heads, new, head_dim)` each; return `(batch, new, heads, head_dim)`."""
        ...


_watcher: ContextVar[Watcher] = ContextVar("lmopt_fused_watcher")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    return _watcher.get().attend(query, key, value, attention_mask, options), None


def _mask(
    batch_size: int,
    q_length: int,
    mask_function: MaskRule | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    from transformers.masking_utils import causal_mask_function

    shape = torch.empty(batch_size, q_length, device=device)
    return _watcher.get().mask(mask_function or causal_mask_function, shape)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def route(twin: PreTrainedModel) -> None:
    """Let a twin's attention and masks go through this module from now on."""
    for config in configs_of(twin):
        config._attn_implementation_internal = NAME


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Make `watcher` the one of this thread while the block runs."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class PassingCache(DynamicCache):  # type: ignore[misc]
    """A cache that keeps nothing and hands new keys and values straight on to the attention.

    Attributes:
        latest: Layer number, keys and values of the last update.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = [DynamicLayer() for _ in range(layers)]
        self.latest: tuple[int, Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note the new keys and values of a layer."""
        self.latest = layer_idx, key_states, value_states
        return key_states, value_states
