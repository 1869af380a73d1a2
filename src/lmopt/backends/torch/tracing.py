"""Trace a decoder once, with every axis that can vary left free."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lmopt.backends.torch.encoder_decoder import EncoderDecoder, sample_inputs
from lmopt.backends.torch.language_model import Decoder, device_of, dtype_name, is_transformers
from lmopt.errors import ExportError, UnsupportedError

# Sizes of the sample: all above 1, which torch would take for fixed, and all different.
_BATCH, _SEQUENCE, _PAST, _SOURCE = 2, 3, 5, 7


def export_program(
    decoder: Decoder, *, may_fix: bool
) -> tuple["torch.export.ExportedProgram", tuple[Any, ...]]:
    """Trace a decoder with free batch, length and past.

    Args:
        decoder: From `as_decoder`.
        may_fix: Whether the trace may be repeated with wishes instead of demands for free sizes.
            torch's shape rule of an LSTM fixes the length although the operator does not: a
            translation of operators stays free then, the program itself does not.

    Returns:
        The program, and the sample arguments `(input_ids, attention_mask, position_ids, state)`.

    Raises:
        UnsupportedError: A size is fixed, and may not be.
        ExportError: The module branches on values; torch's reason is kept.
    """
    arguments, free = sample_arguments(decoder)
    return _trace(decoder, decoder.module, arguments, free, may_fix=may_fix)


def export_encoder(
    decoder: EncoderDecoder, *, may_fix: bool
) -> tuple["torch.export.ExportedProgram", tuple[Any, ...]]:
    """Trace an encoder, with what the decoder makes of its outputs once, with free batch and source.

    Args:
        decoder: From `as_decoder`.
        may_fix: As for `export_program`.

    Returns:
        The program, which gives `signature.from_source` in order, and the sample arguments
        `(inputs, source_mask)`.

    Raises:
        UnsupportedError, ExportError: As for `export_program`.
    """
    device, source = device_of(decoder), decoder.source
    inputs = sample_inputs(source, _BATCH, (source.length if source.fixed else None) or _SOURCE, device)
    if source.kind == "features":
        inputs = inputs.to(getattr(torch, dtype_name(decoder.module)))
    masked = decoder.takes_source_mask
    mask = torch.ones(_BATCH, inputs.shape[-1], dtype=torch.int64, device=device) if masked else None
    any_size = torch.export.Dim.DYNAMIC
    rows = {0: any_size}
    places = rows if source.fixed else {0: any_size, inputs.dim() - 1: any_size}
    free = (places, {0: any_size, 1: any_size} if masked else None)
    return _trace(_Encoder(decoder), decoder.module, (inputs, mask), free, may_fix=may_fix)


class _Encoder(nn.Module):
    """The part of an encoder-decoder that runs once."""

    def __init__(self, decoder: EncoderDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, inputs: Tensor, source_mask: Tensor | None) -> list[Tensor]:
        state = self.decoder.encode(inputs, source_mask)
        signature = self.decoder.signature
        wanted = {one.past.name for one in signature.from_source}
        return [leaf for one, leaf in zip(signature.state, state, strict=True) if one.past.name in wanted]


def _trace(
    traced: nn.Module, module: nn.Module, arguments: tuple[Any, ...], free: tuple[Any, ...], *, may_fix: bool
) -> tuple["torch.export.ExportedProgram", tuple[Any, ...]]:
    name = type(module).__name__
    with warnings.catch_warnings(), torch.no_grad(), traceable(module):
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(traced, arguments, dynamic_shapes=free, strict=False), arguments
        except Exception as error:
            fixed = error
        try:
            program = torch.export.export(traced, arguments, dynamic_shapes=_hinted(free), strict=False)
        except Exception as error:
            raise ExportError(
                f"torch cannot trace {name} for any batch and length: {plain_reason(error)}\n"
                "A forward must not branch on values, nor fix the batch or the length."
            ) from error
    if not may_fix:
        raise UnsupportedError(
            f"torch fixes a size when it traces {name}, so the program would serve one length only: "
            f"{plain_reason(fixed)}"
        ) from fixed
    return program, arguments


def plain_reason(error: Exception) -> str:
    """Give the first lines of torch's explanation, without colours and advice."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return "\n".join(text.splitlines()[:4])


def sample_arguments(decoder: Decoder) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Make sample arguments and say which of their axes are free."""
    signature = decoder.signature
    device = device_of(decoder)
    any_size = torch.export.Dim.DYNAMIC
    past = _PAST if signature.grows else 0
    state = decoder.zero_state(_BATCH, device, past=past, source=_SOURCE)
    ids = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64, device=device)
    mask = (
        torch.ones(_BATCH, _SEQUENCE + past, dtype=torch.int64, device=device) if signature.has_mask else None
    )
    positions: Tensor | None = None
    if signature.has_positions:
        positions = past + torch.arange(_SEQUENCE, device=device).expand(_BATCH, -1)
    both = {0: any_size, 1: any_size}
    free_state = [
        {axis: any_size for axis, size in enumerate(one.past.shape) if isinstance(size, str)}
        for one in signature.state
    ]
    free = (both, both if mask is not None else None, both if positions is not None else None, free_state)
    return (ids, mask, positions, state), free


def _hinted(free: Any) -> Any:
    """Turn demands for a free axis into wishes."""
    if isinstance(free, dict):
        return dict.fromkeys(free, torch.export.Dim.AUTO)
    if isinstance(free, tuple | list):
        return type(free)(_hinted(one) for one in free)
    return free


@contextlib.contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Make a transformers model traceable for the time of one export, by transformers' own means."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unencumbered())
        # Any: nn.Module's attributes are tensors or modules to a type checker.
        model: Any = module
        if getattr(model, "_can_set_experts_implementation", lambda: False)():
            # One operator over all experts instead of a loop over those that were chosen.
            stack.callback(model.set_experts_implementation, model.get_experts_implementation())
            model.set_experts_implementation("batched_mm")
        if is_transformers(module):
            with contextlib.suppress(ImportError):  # transformers before 5.23
                from transformers.exporters import exporter_dynamo, exporter_onnx  # noqa: F401 (they register patches)
                from transformers.exporters.utils import apply_patches

                stack.enter_context(apply_patches("dynamo"))
                stack.enter_context(apply_patches("onnx"))
        yield


@contextlib.contextmanager
def unencumbered() -> Iterator[None]:
    """Let torch do without what takes longer than it saves while it traces or translates: half of an export's time.

    It keeps shapes of results by the shapes of arguments, and with free sizes keeping and finding them takes longer
    than working them out. It notes for each operator which lines of code led to it, which nobody is going to read.
    """
    from torch._dynamo import config as dynamo
    from torch.fx import config as fx

    switches = ((dynamo, "fake_tensor_cache_enabled", False), (fx, "do_not_emit_stack_traces", True))
    with contextlib.ExitStack() as stack:
        for config, name, value in switches:
            if hasattr(config, name):
                stack.callback(setattr, config, name, getattr(config, name))
                setattr(config, name, value)
        yield
