"""Trace a lowered twin into a graph whose boundary is still torch's."""

import contextlib
import warnings
from typing import Any, Final

import onnx_ir as ir
import torch

from lmopt.backends.torch.fused.lower import FusedDecoder
from lmopt.backends.torch.fused.operators import Rows
from lmopt.backends.torch.fused.reason import InexpressibleError
from lmopt.backends.torch.graph import as_operators
from lmopt.backends.torch.lowering import tracing_for
from lmopt.backends.torch.quantized_lowering import lowered
from lmopt.backends.torch.tracing import plain_reason, traceable
from lmopt.signature import Signature

# Sizes of the sample: all above 1, which torch would take for fixed, and all different.
_BATCH, _SEQUENCE, _CAPACITY = 2, 3, 11
_FIXED: Final[Any] = (None, None, None)


def trace(
    decoder: FusedDecoder,
    signature: Signature,
    device: torch.device,
    *,
    opset: int,
    accuracy_level: int | None,
) -> ir.Model:
    """Trace with free batch, length and capacity.

    Args:
        decoder: The lowered twin.
        signature: Names and axes of the state.
        device: Where the weights are.
        opset: Version of the ONNX operators.
        accuracy_level: Of quantized products; see `lmopt.backends.torch.quantized_lowering.lowered`.

    Returns:
        A model with the inputs `input_ids`, `position_ids`, those of `Rows` and the state, in this order
        and under torch's names; operators of the domain `lmopt` are still in it.

    Raises:
        InexpressibleError: torch cannot trace or translate the twin.
    """
    free = torch.export.Dim.DYNAMIC
    both = {0: free, 1: free}
    state = [
        torch.zeros(one.sizes(_BATCH, _CAPACITY), dtype=getattr(torch, one.past.dtype), device=device)
        for one in signature.state
    ]
    arguments: tuple[Any, ...] = (
        torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64, device=device),
        torch.arange(_SEQUENCE, device=device).expand(_BATCH, -1).contiguous(),
        Rows(
            torch.full((_BATCH,), _SEQUENCE - 1, dtype=torch.int32, device=device),
            torch.tensor(_SEQUENCE, dtype=torch.int32, device=device),
            torch.full((_BATCH,), _SEQUENCE, dtype=torch.int32, device=device),
        ),
        state,
    )
    # Attention alone reads lengths and state, as a whole: that their sizes vary need not be traced.
    shapes = (both, both, Rows(*_FIXED), [None] * len(state))
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.no_grad())
        stack.enter_context(traceable(decoder.module))
        stack.enter_context(tracing_for("onnxruntime"))
        stack.enter_context(lowered(decoder.module, accuracy_level))
        try:
            program = torch.export.export(decoder, arguments, dynamic_shapes=shapes, strict=False)
            # The model's own way from its linears to attention, which nothing reads: half of the trace.
            program.graph_module.graph.eliminate_dead_code()
            return as_operators(program, arguments, opset)
        except InexpressibleError:
            raise
        except Exception as error:
            raise InexpressibleError(f"torch cannot trace it: {plain_reason(error)}") from error
