"""Write an encoder-decoder as two ONNX graphs: what runs once for a source, and what runs once a token.

The encoder's graph also computes what the decoder makes of the encoder's outputs once, the keys and values of
cross-attention; so no step of the decoder computes anything of the source again.
"""

import contextlib
from typing import Any, Final

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lmopt.backends.torch.encoder_decoder import EncoderDecoder
from lmopt.backends.torch.export_onnx import refuse_recurrent_halves
from lmopt.backends.torch.fused.appending import append_inside, mask_inside
from lmopt.backends.torch.fused.edits import Edits
from lmopt.backends.torch.fused.layout import drop_idle
from lmopt.backends.torch.fused.operators import MICROSOFT
from lmopt.backends.torch.fused.shared_sources import share_sources
from lmopt.backends.torch.fused.skips import join_skips
from lmopt.backends.torch.fused.unpadded import name_tokens, skip_padding
from lmopt.backends.torch.graph import (
    encoder_inputs,
    find_taps,
    fold,
    inputs_of,
    module_paths,
    name_boundary,
    name_encoder,
    shown_taps,
    tidy,
    translate,
)
from lmopt.backends.torch.half_scales import store_halves
from lmopt.backends.torch.language_model import dtype_name
from lmopt.backends.torch.lowering import Dialect, tracing_for
from lmopt.backends.torch.portable_quantized import finish_portable
from lmopt.backends.torch.quantized import rounded_bits
from lmopt.backends.torch.quantized_lowering import lowered
from lmopt.backends.torch.row_products import multiply_in_int8
from lmopt.backends.torch.tracing import export_encoder, export_program
from lmopt.contracts import ExportRequest
from lmopt.errors import UnsupportedError
from lmopt.signature import ATTENTION_MASK, SOURCE_MASK, Signature
from lmopt.types import SourceFacts

ENCODER: Final = "encoder_model.onnx"
DECODER: Final = "decoder_model.onnx"
# Tokens of a row, where no number of positions is known, that show a window of attention.
_LONG: Final = 1 << 14


def export_both(
    request: ExportRequest,
    decoder: EncoderDecoder,
    opset: int,
    accuracy_level: int | None = None,
    products: str = "auto",
) -> dict[str, Any]:
    """Write `encoder_model.onnx` and `decoder_model.onnx` with their external data.

    In the dialect `"onnxruntime"` attention and products with quantized weights are ONNX Runtime's own operators;
    the rest, and how the cache grows, is as in the portable one.

    Args:
        request: What to export, and for which target.
        decoder: From `as_decoder`.
        opset: Version of the operators.
        accuracy_level: Of quantized products; see `lmopt.backends.torch.quantized_lowering.lowered`.
        products: `"int8"` writes products with float weights as `lmopt.backends.torch.row_products` says,
            `"int8-encoder"` those of the encoder's graph alone.

    Returns:
        What the manifest records of the format.

    Raises:
        ExportError: torch cannot trace or translate the module.
        UnsupportedError: No engine runs the result.
    """
    name = type(request.module).__name__
    target, reason = _target(request)
    if products != "auto" and reason:
        raise UnsupportedError(f"products={products!r} is of the dialect 'onnxruntime', and {name}: {reason}")
    microsoft, rewritten, signature = False, 0, decoder.signature
    operators: set[str] = set()
    files: list[str] = []
    shown: dict[str, list[list[str]]] = {}
    decoding: set[str] = set()
    for file in (ENCODER, DECODER):
        with contextlib.ExitStack() as stack:
            stack.enter_context(tracing_for(target))
            if target == "onnxruntime":
                stack.enter_context(lowered(request.module, accuracy_level))
            trace = export_encoder if file == ENCODER else export_program
            program, arguments = trace(decoder, may_fix=True)
            model = translate(program, arguments, opset, name)
        del program
        taps = find_taps(model)
        if file == DECODER:
            decoding = {path for node in model.graph for path in module_paths(node)}
        if target == "portable":
            finish_portable(model, opset)
        if target == "onnxruntime":
            _share_tables(model.graph)
        fold(model)
        if target == "onnxruntime":
            RemoveUnusedNodesPass()(model)
            edits = Edits(model, taps)
            drop_idle(edits)
            if file == DECODER and _fuse_decoder(edits, signature, request.facts.context_length or _LONG):
                signature = signature.sharing_sources()
            elif file == ENCODER and signature.has_source_mask:
                _fuse_encoder(edits, signature, decoder.source)
            join_skips(edits)
            if products == "int8" or (products == "int8-encoder" and file == ENCODER):
                vocabularies = {signature.vocab_size, decoder.source.size}
                rewritten += multiply_in_int8(edits, vocabularies, few_rows=file == DECODER)
            name_tokens(edits)
        tidy(model, file.partition("_")[0])
        # Last: what merges values may give an output the axes of another.
        if file == ENCODER:
            name_encoder(model, signature, decoder.source)
        else:
            name_boundary(model, signature)
        if any(node.domain == MICROSOFT for node in model.graph):
            model.opset_imports[MICROSOFT], microsoft = 1, True
        refuse_recurrent_halves(request.module, model)
        store_halves(model)
        shown[file] = shown_taps(model, taps)
        data = f"{file}.data"
        ir.save(model, request.folder / file, external_data=data, size_threshold_bytes=1024)
        files += [one for one in (file, data) if (request.folder / one).exists()]
        operators |= {node.op_type for node in model.graph}
    if products != "auto" and not rewritten:
        raise UnsupportedError(
            f"products={products!r}: {name} multiplies by no float matrix that is worth it"
        )
    if target == "onnxruntime" and not microsoft:
        target, reason = "portable", "none of its parts has an operator of ONNX Runtime's own"
    return {
        "files": files,
        "encoder": ENCODER,
        "decoder": DECODER,
        "dtype": dtype_name(request.module),
        "operators": sorted(operators),
        "opset": opset,
        "target": target,
        "taps": shown[DECODER],
        # Of a decoder's parts the encoder's graph has some, and all of those parts that the other graph lacks.
        "encoder_taps": [one for one in shown[ENCODER] if one[0] not in decoding],
        **({"fallback": reason} if reason else {}),
        **({"accuracy_level": accuracy_level} if accuracy_level is not None and microsoft else {}),
        **({"products": products, "quantized_products": rewritten} if rewritten else {}),
        **({"activations": bits} if (bits := rounded_bits(request.module)) else {}),
    }


def _fuse_encoder(edits: Edits, signature: Signature, source: SourceFacts) -> None:
    """Let attention of an encoder mask by itself, and what stands between skip padding."""
    model = edits.model
    inputs = encoder_inputs(model, signature, source)
    mask_inside(edits, inputs, ATTENTION_MASK, source.length or _LONG)
    RemoveUnusedNodesPass()(model)
    given = zip(model.graph.outputs, signature.from_source, strict=True)
    hidden = [value for value, one in given if one.past.name.startswith("past_key_values.")]
    skip_padding(edits, model.graph.inputs[1], hidden)


def _fuse_decoder(edits: Edits, signature: Signature, longest: int) -> bool:
    """Let attention of a decoder append and mask by itself; say whether rows may hold their sources together."""
    model = edits.model
    append_inside(edits)
    mask_inside(edits, inputs_of(signature), SOURCE_MASK, longest)
    RemoveUnusedNodesPass()(model)
    state = zip(model.graph.inputs[-len(signature.state) :], signature.state, strict=True)
    return share_sources(edits, [value for value, one in state if not one.present])


def _share_tables(graph: ir.Graph) -> None:
    """Let a head multiply by the embedding that it is tied to as it lies, in place of a turned copy of it."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or len(list(weight.uses())) < 2:
            continue
        for use in list(node.outputs[0].uses()):
            if use.node.op_type != "MatMul" or use.idx != 1:
                continue
            product = ir.node(
                "FusedMatMul",
                [use.node.inputs[0], weight],
                attributes={"transA": 0, "transB": 1, "alpha": 1.0},
                domain=MICROSOFT,
                name=f"{use.node.name}_turned",
            )
            graph.insert_before(use.node, product)
            old, new = use.node.outputs[0], product.outputs[0]
            new.name, new.shape, new.type = f"{old.name}_turned", old.shape, old.type
            old.replace_all_uses_with(new, replace_graph_outputs=True)


def _target(request: ExportRequest) -> tuple[Dialect, str]:
    """Choose the dialect that is written, with the reason where it is not the one asked for."""
    if request.target != "onnxruntime":
        return "portable", ""
    if (dtype := dtype_name(request.module)) != "float32":
        return "portable", f"it computes in {dtype}, and attention between encoder and decoder takes float32"
    return "onnxruntime", ""
