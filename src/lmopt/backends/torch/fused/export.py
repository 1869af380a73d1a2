"""From a decoder to a graph of ONNX Runtime's operators."""

from dataclasses import replace
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from lmopt.backends.torch.fused.edits import Edits, share_equal
from lmopt.backends.torch.fused.finishing import finish_boundary, finish_linears
from lmopt.backends.torch.fused.interface import route
from lmopt.backends.torch.fused.layout import drop_idle
from lmopt.backends.torch.fused.lower import FusedDecoder, check
from lmopt.backends.torch.fused.operators import MICROSOFT
from lmopt.backends.torch.fused.packing import cut_columns, pack
from lmopt.backends.torch.fused.probe import probe
from lmopt.backends.torch.fused.reason import InexpressibleError
from lmopt.backends.torch.fused.skips import join_skips
from lmopt.backends.torch.fused.tables import compute_tables
from lmopt.backends.torch.fused.trace import trace
from lmopt.backends.torch.fused.twin import twin_of
from lmopt.backends.torch.graph import find_taps, fold, name_boundary, tidy
from lmopt.backends.torch.language_model import Decoder, device_of, is_transformers, stated_casts
from lmopt.signature import LOGITS_TO_KEEP, POSITION_IDS, Signature
from lmopt.types import TensorSpec

# Positions of the rotary tables of a model that does not say how many it has.
_CONTEXT: Final = 8192
_MICROSOFT_OPSET: Final = 1


def fused_graph(
    decoder: Decoder, *, context: int | None, opset: int, accuracy_level: int | None = None
) -> tuple[ir.Model, Signature, dict[str, ir.Value]]:
    """Rebuild a transformers decoder on ONNX Runtime's operators; the original is only read.

    Args:
        decoder: From `as_decoder`.
        context: Most positions of the model, if it says so.
        opset: Version of the ONNX operators.
        accuracy_level: Of quantized products; see `lmopt.backends.torch.quantized_lowering.lowered`.

    Returns:
        The graph, its signature, and the value that shows each module's output.

    Raises:
        InexpressibleError: It cannot be said in these operators; the message says why.
    """
    module, signature = decoder.module, decoder.signature
    if not is_transformers(module):
        raise InexpressibleError(
            f"{type(module).__name__} is a module of its own, without transformers' attention interface"
        )
    if casts := stated_casts(module):
        raise InexpressibleError(
            f"{type(module).__name__} computes in {casts['dtype']} and float32, and these operators take one type"
        )
    if not decoder.takes_mask or not decoder.takes_positions:
        raise InexpressibleError(
            f"{type(module).__name__} is not written against transformers' attention interface"
        )
    if not signature.has_mask:
        raise InexpressibleError(f"{type(module).__name__} does not keep padding out of its rows")
    twin = twin_of(module)
    route(twin)
    plan = probe(
        twin,
        layers=len(signature.state) // 2,
        vocabulary=signature.vocab_size,
        context=context or _CONTEXT,
    )
    fused = FusedDecoder(twin, plan)
    device = device_of(module)
    check(fused, lambda ids: decoder.start(ids)[0], signature.vocab_size, device)
    model = trace(fused, signature, device, opset=opset, accuracy_level=accuracy_level)
    edits = Edits(model, find_taps(model))
    share_equal(model.graph)
    fold(model)
    # Of what is computed twice from the same value, one remains, so that its readers can be packed.
    CommonSubexpressionEliminationPass()(model)
    for step in (drop_idle, cut_columns, pack, join_skips, finish_linears, finish_boundary, compute_tables):
        # What nothing reads any more must neither be packed nor hold on to an input.
        RemoveUnusedNodesPass()(model)
        step(edits)
    tidy(model)
    has_positions = any(value.name == POSITION_IDS for value in model.graph.inputs)
    signature = replace(signature, has_mask=True, has_positions=has_positions)
    name_boundary(model, signature, [TensorSpec(LOGITS_TO_KEEP, "int64", (1,))])
    model.opset_imports[MICROSOFT] = _MICROSOFT_OPSET
    model.opset_imports.pop("lmopt", None)
    return model, signature, edits.taps
