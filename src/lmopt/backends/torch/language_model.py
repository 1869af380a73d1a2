"""One way to call any decoder: Hugging Face models, tutorial LSTMs, hand-written GPTs.

`as_decoder` wraps a module so that it takes and returns its state as a flat list of tensors, and
finds out by running it on a few tokens which axis of each tensor holds the rows and which one grows
with the text. Nothing here knows an architecture by name.
"""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmopt.errors import LmoptError, UnsupportedError
from lmopt.signature import ATTENTION_MASK, POSITION_IDS, Signature, StateTensor
from lmopt.types import BATCH, PAST, SourceFacts, TensorSpec

CASTS: Final = "lmopt_casts"
"""Field of `config.json`, or attribute of a module of one's own, that says which modules stayed in float32."""


class LanguageModel(Protocol):
    """What an own module must offer to be a language model in lmopt.

    The names of the parameters are free except the two optional ones. A module that only maps
    ids to logits is accepted too: its state is then the text itself, which it reads again at each
    step.

    Example:
        >>> class Tutorial(nn.Module):
        ...     def __init__(self, vocab_size=100, hidden=32):
        ...         super().__init__()
        ...         self.embedding = nn.Embedding(vocab_size, hidden)
        ...         self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        ...         self.head = nn.Linear(hidden, vocab_size)
        ...
        ...     def forward(self, input_ids, state=None):
        ...         hidden, state = self.lstm(self.embedding(input_ids), state)
        ...         return self.head(hidden), state
    """

    def forward(self, input_ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Read new tokens.

        Args:
            input_ids: `(batch, sequence)` int64.
            state: `None` at the start of a text, afterwards what the last call returned: tensors,
                or tuples, lists and dictionaries of tensors. Each tensor has one axis of size
                `batch`, and may have one that grows by one a token (a key-value cache). A state of
                fixed size must start at zeros.

        A forward that also has parameters named `attention_mask`, `(batch, past + sequence)` int64,
        and `position_ids`, `(batch, sequence)` int64, is given them, and can then read rows of
        unequal length in one call if it honours them.

        Returns:
            Logits `(batch, sequence, vocab_size)` and the state that follows.
        """
        ...


class Decoder(nn.Module):
    """A language model with its state as a flat list of tensors.

    Attributes:
        module: The wrapped module.
        signature: Names and axes of the state; filled in by `as_decoder`.
        takes_mask: Whether the module takes `attention_mask` and might honour it.
        takes_positions: Whether it takes `position_ids`.
    """

    module: nn.Module
    signature: Signature
    takes_mask = False
    takes_positions = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Read new tokens after `state`; see `LanguageModel` for shapes."""
        raise NotImplementedError

    def start(self, input_ids: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """Read a text from its start in the module's own way; return logits and the named state."""
        raise NotImplementedError

    def zero_state(
        self, batch: int, device: torch.device | str = "cpu", *, past: int = 0, source: int = 0
    ) -> list[Tensor]:
        """Make a state of zeros; with `past=0`, that of `batch` rows that have read nothing."""
        return [
            torch.zeros(one.sizes(batch, past, source), dtype=getattr(torch, one.past.dtype), device=device)
            for one in self.signature.state
        ]

    def fresh(self, batch: int, device: torch.device | str = "cpu") -> list[Tensor]:
        """Make a state of rows that have read nothing, to try the module with."""
        return self.zero_state(batch, device)

    def follow(self, state: Sequence[Tensor], present: Sequence[Tensor]) -> list[Tensor]:
        """Give the whole state after a call: what the call gave back, and what no call changes."""
        return list(present)

    def named(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> dict[str, Tensor | None]:
        """Give the arguments that the module takes by name."""
        options: dict[str, Tensor | None] = {}
        if self.takes_mask:
            options[ATTENTION_MASK] = attention_mask
        if self.takes_positions:
            options[POSITION_IDS] = position_ids
        return options


class PlainDecoder(Decoder):
    """A module that meets `LanguageModel`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        names = inspect.signature(module.forward).parameters
        self.takes_mask = ATTENTION_MASK in names
        self.takes_positions = POSITION_IDS in names
        self._structure: pytree.TreeSpec | None = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Read new tokens after `state`."""
        assert self._structure is not None
        options = self.named(attention_mask, position_ids)
        logits, after = self.module(input_ids, pytree.tree_unflatten(list(state), self._structure), **options)
        return logits, pytree.tree_leaves(after)

    def start(self, input_ids: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """Read a text from its start; learn the structure of the state."""
        logits, after = self.module(input_ids)
        leaves, self._structure = pytree.tree_flatten(after)
        if strange := [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]:
            raise UnsupportedError(
                f"the state of {type(self.module).__name__} holds {strange[0]}; lmopt needs tensors, or tuples, "
                "lists and dictionaries of tensors (keep a counter as a tensor, or derive it from a cache's length)"
            )
        return logits, [(f"past_state.{index}", leaf) for index, leaf in enumerate(leaves)]


class RereadingDecoder(Decoder):
    """A module that maps ids to logits and keeps nothing: the state is the text so far."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Read the whole text again and return the logits of its new end."""
        text = torch.cat([state[0], input_ids], dim=1)
        logits = self.module(text)
        return logits[:, text.shape[1] - input_ids.shape[1] :], [text]

    def start(self, input_ids: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """Read a text from its start."""
        return self.module(input_ids), [("past_state.input_ids", input_ids)]


def as_decoder(module: nn.Module, source: SourceFacts | None = None) -> Decoder:
    """Wrap a language model so that engines and exporters can call it.

    Args:
        module: A transformers causal language model, or a module that meets `LanguageModel`; or an
            encoder-decoder of transformers, or one that meets
            `lmopt.backends.torch.encoder_decoder.EncoderDecoderModel`, which becomes an `EncoderDecoder`.
        source: What the encoder of a module of one's own reads; `None` for modules without one.

    Raises:
        UnsupportedError: Its outputs or its state are not those of a decoder; the message says
            what was found.
    """
    if found := _with_encoder(module, source):
        return found
    decoder = _wrap(module)
    try:
        with torch.no_grad():
            decoder.signature = find_signature(decoder)
    except LmoptError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{type(module).__name__} cannot be called as a decoder: {type(error).__name__}: {error}"
        ) from error
    return decoder


def dtype_name(module: nn.Module) -> str:
    """Name the type that a module computes in: the one it was cast to, or that of its first weight or real buffer."""
    if casts := stated_casts(module):
        return str(casts["dtype"])
    tensors = itertools.chain(module.parameters(), module.buffers())
    names = (str(one.dtype).removeprefix("torch.") for one in tensors if one.is_floating_point())
    return next(names, "float32")


def device_of(module: nn.Module) -> torch.device:
    """Name the device of a module's first weight, the CPU for a module without any."""
    return next((weight.device for weight in module.parameters()), torch.device("cpu"))


def stated_casts(module: nn.Module) -> dict[str, Any]:
    """Give what a model says of itself that was cast: `{"dtype": "float16", "float32": {path: wide}}`.

    A path is that of a module that stayed in float32, `wide` whether what it gives does too. Empty for others.
    """
    module = module.module if isinstance(module, Decoder) else module
    found = getattr(module.config, CASTS, None) if is_transformers(module) else getattr(module, CASTS, None)
    return dict(found) if isinstance(found, Mapping) else {}


def is_transformers(module: object) -> bool:
    """Say whether a module is a transformers model, without importing transformers."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(module).__mro__)


def _with_encoder(module: nn.Module, source: SourceFacts | None) -> Decoder | None:
    """Wrap an encoder-decoder; `None` for a module that is none."""
    if is_transformers(module):
        if not getattr(module.config, "is_encoder_decoder", False):
            return None
        from lmopt.backends.torch.encoder_decoder import as_encoder_decoder
        from lmopt.backends.torch.huggingface_seq2seq import HuggingFaceEncoderDecoder, source_facts

        return as_encoder_decoder(HuggingFaceEncoderDecoder(module, source or source_facts(module)))
    if source is None:
        return None
    from lmopt.backends.torch.encoder_decoder import PlainEncoderDecoder, as_encoder_decoder

    return as_encoder_decoder(PlainEncoderDecoder(module, source))


def _wrap(module: nn.Module) -> Decoder:
    if is_transformers(module):
        from lmopt.backends.torch.huggingface import HuggingFaceDecoder

        return HuggingFaceDecoder(module)
    device = device_of(module)
    with torch.no_grad():
        result = module(torch.zeros(1, 1, dtype=torch.int64, device=device))
    if isinstance(result, Tensor):
        return RereadingDecoder(module)
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor):
        return (
            PlainDecoder(module) if pytree.tree_leaves(result[1]) else RereadingDecoder(_FirstOutput(module))
        )
    raise UnsupportedError(
        f"{type(module).__name__}.forward(input_ids) returned {type(result).__name__}; lmopt needs "
        "(logits, state) or logits alone: see lmopt.backends.torch.language_model.LanguageModel"
    )


class _FirstOutput(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.module(input_ids)[0]
        return logits


def find_signature(decoder: Decoder) -> Signature:
    """Run the module on a few tokens and see which axes follow the batch and the length."""
    device = device_of(decoder)
    shapes: list[list[tuple[int, ...]]] = []
    for batch, length in ((2, 3), (3, 3), (2, 5)):
        logits, named = decoder.start(torch.zeros(batch, length, dtype=torch.int64, device=device))
        if logits.dim() != 3 or logits.shape[:2] != (batch, length):
            raise UnsupportedError(
                f"{type(decoder.module).__name__} returned logits of shape {tuple(logits.shape)} for input ids of "
                f"shape ({batch}, {length}); expected ({batch}, {length}, vocab_size)"
            )
        shapes.append([tuple(leaf.shape) for _, leaf in named])
    state = tuple(
        _state_tensor(name, leaf, first, wider, longer)
        for (name, leaf), first, wider, longer in zip(named, *shapes, strict=True)
    )
    signature = Signature(state, decoder.takes_mask, decoder.takes_positions, logits.shape[-1])
    if decoder.takes_mask:
        decoder.signature = signature
        if not _honours_mask(decoder, device):
            return replace(signature, has_mask=False)
    return signature


def _state_tensor(
    name: str, leaf: Tensor, first: tuple[int, ...], wider: tuple[int, ...], longer: tuple[int, ...]
) -> StateTensor:
    if not len(first) == len(wider) == len(longer):
        raise UnsupportedError(
            f"{name} changes its number of axes with batch or length: {first}, {wider}, {longer}"
        )
    batch_axes = [axis for axis, size in enumerate(first) if (size, wider[axis]) == (2, 3)]
    grown = [axis for axis, size in enumerate(first) if size != longer[axis]]
    grows_by_token = all((first[axis], longer[axis]) == (3, 5) for axis in grown)
    if len(batch_axes) != 1 or len(grown) > 1 or not grows_by_token:
        raise UnsupportedError(
            f"state tensor {name} has shape {first} for 2 rows of 3 tokens, {wider} for 3 rows, and {longer} for 5 "
            "tokens; lmopt needs one axis of the batch's size and at most one that grows by one a token"
        )
    shape: list[int | str] = list(first)
    shape[batch_axes[0]] = BATCH
    for axis in grown:
        shape[axis] = PAST
    return StateTensor.of(TensorSpec(name, str(leaf.dtype).removeprefix("torch."), tuple(shape)))


def _honours_mask(decoder: Decoder, device: torch.device) -> bool:
    """See whether padding between past and new tokens leaves a row's logits alone, up to rounding."""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]], device=device) % decoder.signature.vocab_size
    text = decoder.start(ids)[0][0, -3:].float()

    def behind(past: Tensor, mask: Tensor, where: Tensor) -> Tensor:
        before = decoder.fresh(1, device)
        _, present = decoder(past, mask, where, before)
        state = decoder.follow(before, present)
        mask = torch.cat([mask, torch.ones_like(ids[:, :3])], dim=1)
        new = torch.tensor([[3, 4, 5]], device=device)
        logits: Tensor = decoder(ids[:, 3:], mask, new, state)[0]
        return logits[0].float()

    places = torch.tensor([[0, 1, 2, 2, 2]], device=device)
    mask = torch.tensor([[1, 1, 1, 0, 0]], device=device)
    padded = behind(torch.cat([ids[:, :3], ids[:, :2]], dim=1), mask, places)
    # What reading in two calls does to the row without any padding is not the mask's doing: in a model with large
    # activations it can be more than the usual limit.
    rounding = (behind(ids[:, :3], mask[:, :3], places[:, :3]) - text).abs().max()
    limit = 1e-3 + 1e-3 * text.abs() + 4 * rounding
    return bool(((padded - text).abs() <= limit).all())
