"""Call any transformers causal language model with its cache as a flat list of tensors."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lmopt.backends.torch.attention import position_attention
from lmopt.backends.torch.cache_name import cache_name, cache_of, parameters_of
from lmopt.backends.torch.language_model import Decoder
from lmopt.errors import UnsupportedError
from lmopt.signature import ATTENTION_MASK, POSITION_IDS


class HuggingFaceDecoder(Decoder):
    """A transformers model whose layers keep keys and values.

    A cache that keeps every token is used for sliding-window layers too: which keys they see is
    the mask's business, so that one layout serves all layers and all engines.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        names = parameters_of(module)
        # A model that is not written against the interface may look at slots instead of positions
        # (GPT-Neo's local layers do), where no short probe would show it: it gets no padding.
        self.takes_mask = ATTENTION_MASK in names and cast("Any", module)._can_set_attn_implementation()
        self.takes_positions = POSITION_IDS in names
        self._cache_name = cache_name(module)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Read new tokens after `state`, which holds each layer's keys and values in turn."""
        cache = DynamicCache()
        for key, value in zip(state[::2], state[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        logits, after = self.run(input_ids, attention_mask, position_ids, cache)
        return logits, [leaf for _, leaf in _leaves(after, self.module)]

    def run(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any
    ) -> tuple[Tensor, Any]:
        """Read new tokens after what a cache of transformers holds; give the logits and the cache after them."""
        options = self.named(attention_mask, position_ids)
        # Any: nn.Module's attributes are tensors or modules to a type checker.
        model: Any = self.module
        with position_attention(model):
            result = model(input_ids=input_ids, use_cache=True, **{self._cache_name: cache}, **options)
        return result.logits, cache_of(result)

    def start(self, input_ids: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """Read a text from its start exactly as transformers does."""
        try:
            result = self.module(input_ids=input_ids, use_cache=True, **{self._cache_name: DynamicCache()})
        except Exception as error:
            if getattr(self.module, "_is_stateful", False):
                raise UnsupportedError(
                    f"{type(self.module).__name__} keeps a recurrent state besides keys and values, or instead of "
                    "them; lmopt runs transformers models with a key-value cache in every layer. Wrap it as a "
                    "LanguageModel (lmopt.Model.from_module) to run it by its own state."
                ) from error
            raise
        return result.logits, _leaves(cache_of(result), self.module)


def _leaves(cache: object, module: nn.Module) -> list[tuple[str, Tensor]]:
    layers = getattr(cache, "layers", None)
    if not layers or any(not isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise UnsupportedError(
            f"{type(module).__name__} keeps a {type(cache).__name__} whose layers are not all keys and values; "
            "lmopt runs transformers models with a key-value cache in every layer"
        )
    return [
        (f"past_key_values.{index}.{kind}", leaf)
        for index, layer in enumerate(layers)
        for kind, leaf in (("key", layer.keys), ("value", layer.values))
    ]
