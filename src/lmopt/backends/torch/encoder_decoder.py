"""One way to call any encoder-decoder: a decoder whose state begins with what an encoder made of a source.

The state is that of `lmopt.backends.torch.language_model.Decoder`, with tensors that no call changes: keys and
values of cross-attention, or whatever a module of one's own makes of a source. The source's mask, where there is
one, is one of them, so that rows carry it along like everything else.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmopt.backends.torch.language_model import Decoder, device_of, find_signature, is_transformers
from lmopt.errors import LmoptError, UnsupportedError
from lmopt.signature import ATTENTION_MASK, POSITION_IDS, SOURCE_MASK, Signature, StateTensor
from lmopt.types import SOURCE, SourceFacts

# Positions of the sources that a module is tried with; no other size of a trial is like the first.
_TRIAL: Final = 4
_LONGER: Final = 9


class EncoderDecoderModel(Protocol):
    """What an own module must offer to be an encoder-decoder in lmopt.

    Give it to `lmopt.Model.from_module(module, source=lmopt.SourceFacts(...))`. Both methods may have a parameter
    named `encoder_attention_mask`, `(batch, source)` int64, 1 at positions of the source and 0 at padding behind
    it, and can then read sources of unequal length in one batch if they honour it. It needs a default: one source
    alone is also read without.
    """

    def encode(self, inputs: Tensor) -> Any:
        """Read sources.

        Args:
            inputs: `(batch, source)` int64 ids, or `(batch, size, source)` float32 features.

        Returns:
            The state from which the decoder begins: tensors, or tuples, lists and dictionaries of tensors, each
            with one axis of size `batch`. One that grows with the text has length 0 along that axis. One that has
            an axis as long as the source is handed through by `forward` as it is.
        """
        ...

    def forward(self, input_ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read new tokens; as `lmopt.backends.torch.language_model.LanguageModel.forward`, after `encode`."""
        ...


class EncoderDecoder(Decoder):
    """An encoder-decoder with its state as a flat list of tensors.

    Attributes:
        source: What the encoder reads.
        takes_source_mask: Whether the mask of the source is part of the state, as its last tensor.
    """

    source: SourceFacts
    takes_source_mask = False

    def __init__(self, module: nn.Module, source: SourceFacts) -> None:
        super().__init__(module)
        self.source = source

    def encode(self, inputs: Tensor, source_mask: Tensor | None) -> list[Tensor]:
        """Read sources; return the state of decoders that have read nothing.

        Args:
            inputs: As in `EncoderDecoderModel.encode`.
            source_mask: `(batch, source)` int64, ignored by modules that take none.
        """
        raise NotImplementedError

    def fresh(self, batch: int, device: torch.device | str = "cpu") -> list[Tensor]:
        """Read the same source for each row, to try the module with."""
        return self.try_source(batch, self.source.length if self.source.fixed else _TRIAL, device)

    def try_source(self, batch: int, length: int | None, device: torch.device | str) -> list[Tensor]:
        """Read sources of `length` positions."""
        inputs = sample_inputs(self.source, batch, length or _TRIAL, device)
        if inputs.is_floating_point():
            inputs = inputs.to(next(self.module.parameters()).dtype)
        mask = torch.ones(batch, inputs.shape[-1], dtype=torch.int64, device=device)
        return self.encode(inputs, mask)

    def follow(self, state: Sequence[Tensor], present: Sequence[Tensor]) -> list[Tensor]:
        """Give the whole state after a call."""
        given = iter(present)
        return [next(given) if self.changes(place) else one for place, one in enumerate(state)]

    def changes(self, place: int) -> bool:
        """Whether calls give this tensor of the state back."""
        raise NotImplementedError

    def names(self, state: Sequence[Tensor]) -> list[str]:
        """Name the tensors of the state."""
        raise NotImplementedError

    def start(self, input_ids: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """Read a text after the source of a trial."""
        before = self.fresh(len(input_ids), input_ids.device)
        logits, present = self(input_ids, None, None, before)
        state = self.follow(before, present)
        return logits, list(zip(self.names(state), state, strict=True))


class PlainEncoderDecoder(EncoderDecoder):
    """A module that meets `EncoderDecoderModel`."""

    def __init__(self, module: nn.Module, source: SourceFacts) -> None:
        super().__init__(module, source)
        model: Any = module
        names = inspect.signature(module.forward).parameters
        self._encodes_masked = SOURCE_MASK in inspect.signature(model.encode).parameters
        self._decodes_masked = SOURCE_MASK in names
        self.takes_mask, self.takes_positions = ATTENTION_MASK in names, POSITION_IDS in names
        self.takes_source_mask = self._encodes_masked or self._decodes_masked
        self._structure: pytree.TreeSpec | None = None
        self._kept = self._find_kept()

    def encode(self, inputs: Tensor, source_mask: Tensor | None) -> list[Tensor]:
        """Read sources; learn the structure of the state."""
        options = {SOURCE_MASK: source_mask} if self._encodes_masked else {}
        model: Any = self.module
        leaves, self._structure = pytree.tree_flatten(model.encode(inputs, **options))
        if not leaves or (strange := [one for one in leaves if not isinstance(one, Tensor)]):
            found = type(strange[0]).__name__ if leaves else "nothing"
            raise UnsupportedError(
                f"the state that {type(self.module).__name__}.encode returns holds {found}; lmopt needs tensors, or "
                "tuples, lists and dictionaries of tensors"
            )
        if self.takes_source_mask:
            assert source_mask is not None
            return [*leaves, source_mask]
        return list(leaves)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Read new tokens; give the logits and what has changed."""
        logits, after = self._run(input_ids, self.named(attention_mask, position_ids), state)
        return logits, [leaf for leaf, kept in zip(after, self._kept, strict=True) if not kept]

    def changes(self, place: int) -> bool:
        """Whether calls give this tensor of the state back."""
        return place < len(self._kept) and not self._kept[place]

    def names(self, state: Sequence[Tensor]) -> list[str]:
        """Name the tensors of the state."""
        found = [f"{'source' if kept else 'past'}_state.{place}" for place, kept in enumerate(self._kept)]
        return [*found, SOURCE_MASK] if self.takes_source_mask else found

    def _run(self, input_ids: Tensor, options: dict[str, Any], state: Sequence[Tensor]) -> Any:
        assert self._structure is not None
        leaves = list(state)
        if self.takes_source_mask:
            mask = leaves.pop()
            if self._decodes_masked:
                options = {**options, SOURCE_MASK: mask}
        logits, after = self.module(input_ids, pytree.tree_unflatten(leaves, self._structure), **options)
        return logits, pytree.tree_leaves(after)

    def _find_kept(self) -> list[bool]:
        """See which tensors of the state a call hands through."""
        device = device_of(self.module)
        with torch.no_grad():
            before = self.fresh(2, device)
            ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
            _, after = self._run(ids, {}, before)
        return [one is other for one, other in zip(before, after, strict=False)]


def as_encoder_decoder(decoder: EncoderDecoder) -> EncoderDecoder:
    """Find out which axes of the state follow the source, and whether sources of unequal length may share a batch.

    Raises:
        UnsupportedError: Its outputs or its state are not those of an encoder-decoder.
    """
    name = type(decoder.module).__name__
    try:
        with torch.no_grad():
            decoder.signature = _with_source_axes(decoder, find_signature(decoder))
            if decoder.takes_source_mask and not _honours_source_mask(decoder):
                raise UnsupportedError(
                    f"{name} takes {SOURCE_MASK}, but what it says changes with padding behind the source. Honour the "
                    "mask, or leave the parameter out: sources of unequal length are then kept apart."
                )
    except LmoptError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{name} cannot be called as an encoder-decoder: {type(error).__name__}: {error}"
        ) from error
    return decoder


def sample_inputs(source: SourceFacts, batch: int, length: int, device: torch.device | str) -> Tensor:
    """Make the same source for each row, to try a module with."""
    if source.kind == "ids":
        return (torch.arange(length, device=device) % source.size).repeat(batch, 1)
    return (
        torch.linspace(-1, 1, source.size * length, device=device)
        .reshape(source.size, length)
        .repeat(batch, 1, 1)
    )


def trial_inputs(module: nn.Module, source: SourceFacts | None, batch: int) -> Tensor | None:
    """Make sources to try a module with, where it is and in its type; `None` for a module without an encoder."""
    if source is None:
        return None
    length = source.length if source.fixed and source.length else _TRIAL
    return as_read(module, sample_inputs(source, batch, length, device_of(module)))


def as_read(module: nn.Module, inputs: Tensor) -> Tensor:
    """Put sources where a module is, features in its type."""
    inputs = inputs.to(device_of(module))
    return inputs.to(next(module.parameters()).dtype) if inputs.is_floating_point() else inputs


def run_after_source(module: nn.Module, source: SourceFacts, ids: Tensor) -> Any:
    """Run a module as its author wrote it, without a cache of ours, on a source to try it with and the ids after it.

    Args:
        module: A transformers model, or one that meets `EncoderDecoderModel`.
        source: What its encoder reads.
        ids: `(batch, sequence)` int64.
    """
    model: Any = module
    inputs = trial_inputs(module, source, len(ids))
    if is_transformers(module):
        return model(**{model.main_input_name: inputs}, decoder_input_ids=ids, use_cache=True)
    if not callable(getattr(module, "encode", None)):
        raise UnsupportedError(
            f"{type(module).__name__} has no method encode(inputs), which reads a source: see "
            "lmopt.backends.torch.encoder_decoder.EncoderDecoderModel"
        )
    return model(ids, model.encode(inputs))


def _with_source_axes(decoder: EncoderDecoder, signature: Signature) -> Signature:
    """Free the axes that are as long as the source."""
    if decoder.source.fixed:
        return signature
    device = device_of(decoder)
    longer = decoder.try_source(2, _LONGER, device)
    state = []
    for one, short, long in zip(signature.state, decoder.fresh(2, device), longer, strict=True):
        axes = [axis for axis, size in enumerate(short.shape) if size != long.shape[axis]]
        if axes and (
            one.present or len(axes) > 1 or short.shape[axes[0]] != _TRIAL or long.shape[axes[0]] != _LONGER
        ):
            raise UnsupportedError(
                f"state tensor {one.past.name} has shape {tuple(short.shape)} for sources of {_TRIAL} positions and "
                f"{tuple(long.shape)} for {_LONGER}; lmopt needs at most one axis, as long as the source, in tensors "
                "that forward hands through as they are"
            )
        shape = tuple(SOURCE if axis in axes else size for axis, size in enumerate(one.past.shape))
        state.append(StateTensor.of(replace(one.past, shape=shape)))
    return replace(signature, state=tuple(state))


def _honours_source_mask(decoder: EncoderDecoder) -> bool:
    """See whether padding behind a source leaves the logits alone."""
    device = device_of(decoder)
    inputs = sample_inputs(decoder.source, 1, _TRIAL, device)
    padded = torch.cat([inputs, inputs], dim=-1)
    mask = torch.ones(1, 2 * _TRIAL, dtype=torch.int64, device=device)
    ids = torch.arange(3, device=device)[None] % decoder.signature.vocab_size
    alone, _ = decoder(ids, None, None, decoder.encode(inputs, mask[:, :_TRIAL]))
    mask[:, _TRIAL:] = 0
    beside, _ = decoder(ids, None, None, decoder.encode(padded, mask))
    return torch.allclose(alone.float(), beside.float(), atol=1e-3, rtol=1e-3)
