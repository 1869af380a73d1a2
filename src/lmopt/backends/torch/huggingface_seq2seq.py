"""Call any transformers encoder-decoder with its caches as a flat list of tensors."""

from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from lmopt.backends.torch.attention import position_attention
from lmopt.backends.torch.cache_name import cache_name, cache_of, parameters_of
from lmopt.backends.torch.encoder_decoder import EncoderDecoder
from lmopt.backends.torch.multi_head import reading_source
from lmopt.errors import UnsupportedError
from lmopt.signature import ATTENTION_MASK, POSITION_IDS, SOURCE_MASK
from lmopt.types import SourceFacts

_KINDS: Final = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


def source_facts(module: nn.Module) -> SourceFacts:
    """Read off a transformers model what its encoder takes.

    Raises:
        UnsupportedError: It takes neither token ids nor features of one known length, or names no token that its
            decoder begins with.
    """
    model: Any = module
    config, encoder = model.config, model.get_encoder()
    settings = getattr(model, "generation_config", None)
    starts = [getattr(one, "decoder_start_token_id", None) for one in (settings, config)]
    start = next((one for one in starts if isinstance(one, int)), None)
    if start is None:
        raise UnsupportedError(
            f"{type(module).__name__} names no decoder_start_token_id, so nobody knows what its decoder begins with. "
            "Set model.config.decoder_start_token_id."
        )
    if model.main_input_name == "input_ids":
        size = encoder.get_input_embeddings().num_embeddings
        # Positions that are told by their distance have no end.
        relative = hasattr(config, "relative_attention_num_buckets")
        length = None if relative else getattr(config, "max_position_embeddings", None)
        return SourceFacts("ids", start, size, length)
    strides = [getattr(getattr(encoder, name, None), "stride", (None,))[0] for name in ("conv1", "conv2")]
    if model.main_input_name != "input_features" or None in strides or not hasattr(config, "num_mel_bins"):
        raise UnsupportedError(
            f"{type(module).__name__} reads {model.main_input_name}; lmopt runs transformers encoder-decoders that "
            "read token ids, or log-mel features as Whisper does. Wrap it to meet "
            "lmopt.backends.torch.encoder_decoder.EncoderDecoderModel to run it by its own state."
        )
    frames = config.max_source_positions * strides[0] * strides[1]
    return SourceFacts("features", start, config.num_mel_bins, frames, fixed=True)


class HuggingFaceEncoderDecoder(EncoderDecoder):
    """A transformers model whose decoder keeps keys and values of its own and of the encoder's tokens."""

    def __init__(self, module: nn.Module, source: SourceFacts) -> None:
        super().__init__(module, source)
        names = parameters_of(module)
        masked = cast("Any", module)._can_set_attn_implementation()
        self.takes_mask = f"decoder_{ATTENTION_MASK}" in names and masked
        self.takes_positions = f"decoder_{POSITION_IDS}" in names
        self.takes_source_mask = source.kind == "ids"
        self._cache_name = cache_name(module)

    def encode(self, inputs: Tensor, source_mask: Tensor | None) -> list[Tensor]:
        """Read sources; the decoder reads one token after them, since only it knows its keys and values.

        In an exported graph nothing of that is left but the keys and values.
        """
        model: Any = self.module
        options = {ATTENTION_MASK: source_mask} if self.takes_source_mask else {}
        token = torch.zeros(inputs.shape[0], 1, dtype=torch.int64, device=inputs.device)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with position_attention(model):
            with reading_source():
                read = model.get_encoder()(**{model.main_input_name: inputs}, **options)
            result = model(
                encoder_outputs=read,
                decoder_input_ids=token,
                use_cache=True,
                **{self._cache_name: cache},
                **options,
            )
        cache = cache_of(result)
        state = []
        for own, cross in self._layers(cache):
            # What the decoder has read does not count.
            state += [own.keys[:, :, :0], own.values[:, :, :0], cross.keys, cross.values]
        if self.takes_source_mask:
            assert source_mask is not None
            state.append(source_mask)
        return state

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Read new tokens; give the logits and the decoder's own keys and values."""
        leaves = list(state)
        options: dict[str, Any] = {ATTENTION_MASK: leaves.pop()} if self.takes_source_mask else {}
        own, cross = DynamicCache(), DynamicCache()
        for place in range(0, len(leaves), len(_KINDS)):
            own.layers.append(_layer(*leaves[place : place + 2]))
            cross.layers.append(_layer(*leaves[place + 2 : place + 4]))
        cache = EncoderDecoderCache(own, cross)
        cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        if self.takes_mask:
            options[f"decoder_{ATTENTION_MASK}"] = attention_mask
        if self.takes_positions:
            options[f"decoder_{POSITION_IDS}"] = position_ids
        # Only its length is read: all that a layer wants of it is in the cache.
        key = leaves[2]
        read = BaseModelOutput(last_hidden_state=key.new_zeros((key.shape[0], key.shape[2], 1)))
        # Any: nn.Module's attributes are tensors or modules to a type checker.
        model: Any = self.module
        with position_attention(model):
            result = model(
                encoder_outputs=read,
                decoder_input_ids=input_ids,
                use_cache=True,
                **{self._cache_name: cache},
                **options,
            )
        present = [leaf for own, _ in self._layers(cache_of(result)) for leaf in (own.keys, own.values)]
        return result.logits, present

    def changes(self, place: int) -> bool:
        """Whether calls give this tensor of the state back: the decoder's own keys and values."""
        return place % len(_KINDS) < 2

    def follow(self, state: Sequence[Tensor], present: Sequence[Tensor]) -> list[Tensor]:
        """Give the whole state after a call."""
        masks = [state[-1]] if self.takes_source_mask else []
        return super().follow(state[: len(state) - len(masks)], present) + masks

    def names(self, state: Sequence[Tensor]) -> list[str]:
        """Name the tensors of the state."""
        layers = len(state) // len(_KINDS)
        found = [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in _KINDS]
        return [*found, SOURCE_MASK] if self.takes_source_mask else found

    def _layers(self, cache: Any) -> list[tuple[Any, Any]]:
        layers = [
            (own, cross)
            for own, cross in zip(
                getattr(getattr(cache, "self_attention_cache", None), "layers", ()),
                getattr(getattr(cache, "cross_attention_cache", None), "layers", ()),
                strict=True,
            )
        ]
        if not layers or any(
            not isinstance(getattr(one, "keys", None), Tensor) for pair in layers for one in pair
        ):
            raise UnsupportedError(
                f"{type(self.module).__name__} keeps a {type(cache).__name__} whose layers are not all keys and "
                "values of the decoder and of the encoder; lmopt runs transformers encoder-decoders with both caches"
            )
        return layers


def _layer(key: Tensor, value: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer
