"""Keys and values kept in 8 bits: a quarter of the memory of a float32 cache, for a little of the quality.

Each token's key and each token's value gets, in each head, a scale `max|x| / 127` of its own and whole numbers
`round(x / scale)`. Nothing is calibrated, and a token's numbers depend on no other token, so that results do not
depend on how a text is split over calls or on the rows beside it. A call attends to the rounded values of its own
tokens too, and dequantizes one layer at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lmopt.backends.torch.huggingface import HuggingFaceDecoder
from lmopt.backends.torch.language_model import Decoder
from lmopt.errors import UnsupportedError
from lmopt.signature import StateTensor
from lmopt.types import TensorSpec

_MOST: Final = 127


class Int8CacheDecoder(Decoder):
    """A transformers model whose state is codes and scales.

    Args:
        decoder: The model with its cache in float.

    Raises:
        UnsupportedError: It is no transformers model, whose cache lmopt would know.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.module)
        if not isinstance(decoder, HuggingFaceDecoder):
            raise UnsupportedError(
                f"kv_cache_dtype='int8' is for transformers models; the state of {type(decoder.module).__name__} is "
                "its own business. Leave the option out."
            )
        self._float = decoder
        self.takes_mask, self.takes_positions = decoder.takes_mask, decoder.takes_positions
        state = [one for codes in decoder.signature.state for one in _stored(codes)]
        self.signature = replace(decoder.signature, state=tuple(state))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Read new tokens after `state`: each layer's keys, their scales, values, and theirs."""
        cache = DynamicCache()
        cache.layers.extend(Int8Layer(*state[first : first + 4]) for first in range(0, len(state), 4))
        logits, cache = self._float.run(input_ids, attention_mask, position_ids, cache)
        return logits, [tensor for layer in cache.layers for tensor in layer.stored()]


class Int8Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer.

    Args:
        keys: `(batch, heads, past, width)` int8.
        key_scales: `(batch, heads, past, 1)` float32.
        values: As `keys`; the width may differ.
        value_scales: As `key_scales`.
    """

    def __init__(self, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor) -> None:
        super().__init__()
        self.keys, self.key_scales = keys, key_scales
        self.values, self.value_scales = values, value_scales
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values; give all of them in their type."""
        self.keys, self.key_scales = _append(self.keys, self.key_scales, key_states)
        self.values, self.value_scales = _append(self.values, self.value_scales, value_states)
        return (
            (self.keys * self.key_scales).to(key_states.dtype),
            (self.values * self.value_scales).to(value_states.dtype),
        )

    def stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give what the layer keeps, in the order in which it is made from it."""
        return self.keys, self.key_scales, self.values, self.value_scales


def _append(codes: Tensor, scales: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    exact = new.float()
    scale = exact.abs().amax(-1, keepdim=True) / _MOST
    # A vector of zeros stays one.
    code = torch.round(exact / torch.where(scale > 0, scale, 1)).to(torch.int8)
    return torch.cat([codes, code], dim=-2), torch.cat([scales, scale], dim=-2)


def _stored(float_state: StateTensor) -> tuple[StateTensor, StateTensor]:
    past = float_state.past
    _, layer, kind = past.name.split(".")
    scales = TensorSpec(f"past_state.{layer}.{kind}_scale", "float32", (*past.shape[:-1], 1))
    return StateTensor.of(replace(past, dtype="int8")), StateTensor.of(scales)
