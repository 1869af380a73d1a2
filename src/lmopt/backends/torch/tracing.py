"""Trace a decoder once, with every axis that can vary left free."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lmopt.backends.torch.language_model import Decoder, device_of, is_transformers
from lmopt.errors import ExportError, UnsupportedError

# Sizes of the sample: all above 1, which torch would take for fixed, and all different.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5


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
    name = type(decoder.module).__name__
    with warnings.catch_warnings(), torch.no_grad(), traceable(decoder.module):
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(decoder, arguments, dynamic_shapes=free, strict=False), arguments
        except Exception as error:
            fixed = error
        try:
            program = torch.export.export(decoder, arguments, dynamic_shapes=_hinted(free), strict=False)
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
    state = decoder.zero_state(_BATCH, device, past=past)
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
