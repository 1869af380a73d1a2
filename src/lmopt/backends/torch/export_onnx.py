"""Write any decoder as one ONNX graph: in the portable dialect, or in ONNX Runtime's own.

The graph takes the cache in and gives it out, so it serves prefill, several tokens at once and
single-token decoding, at any batch, length and past. torch traces the module; what is ours is the
calling convention, the names, the axes, and a tidy graph.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

import onnx_ir as ir
from torch import nn

from lmopt.backends.torch.encoder_decoder import EncoderDecoder
from lmopt.backends.torch.genai_config import genai_config
from lmopt.backends.torch.graph import (
    find_taps,
    fold,
    name_boundary,
    share_reshaped,
    shown_taps,
    tidy,
    translate,
)
from lmopt.backends.torch.half_scales import store_halves
from lmopt.backends.torch.language_model import Decoder, as_decoder, dtype_name
from lmopt.backends.torch.lowering import tracing_for
from lmopt.backends.torch.portable_quantized import finish_portable
from lmopt.backends.torch.products import PRODUCTS, quantize_products, ranges_of
from lmopt.backends.torch.quantized import rounded_bits
from lmopt.backends.torch.tracing import export_program
from lmopt.contracts import ExportRequest
from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.signature import Signature

# Opset 23 brings Attention, which TensorRT does not build in float32; 21 brings 4-bit weights.
OPSET: Final = 21
GRAPH: Final = "model.onnx"
DATA: Final = "model.onnx.data"
RECURRENT: Final = frozenset({"GRU", "LSTM", "RNN"})
FUSED: Final = "onnxruntime"
PRODUCTS_OF_PAIRS: Final = ("auto", "int8", "int8-encoder")
ACCURACY_LEVELS: Final = (None, 1, 4)
CACHE_DTYPES: Final = ("auto", "int8")


def export_onnx(request: ExportRequest) -> Mapping[str, Any]:
    """Write `model.onnx`, its external data and `genai_config.json` into the staging folder.

    Args:
        request: See `lmopt.contracts.ExportRequest`. Targets: `"portable"`, the `ai.onnx` domain
            only; `"onnxruntime"`, with ONNX Runtime's own operators for attention, rotary positions
            and norms, and past and present in one buffer. Options: `opset` (18 or more);
            `products` on `"portable"`: `"int8"` or `"fp8"` lets linears multiply in 8 bits, with scales measured
            on `request.rows`, which is what TensorRT has kernels for; `accuracy_level` of quantized weights on
            `"onnxruntime"`: 4 lets products round activations to 8 bits, which is faster and less exact;
            `kv_cache_dtype="int8"` on `"onnxruntime"` keeps keys and values in 8 bits, with scales measured on
            `request.rows`.

    Returns:
        What the manifest records: files, opset, the target really written and, if it is not the
        one asked for, the reason (`fallback`), and which graph value is the output of which module
        (`taps`), for finding where two engines part.

    Raises:
        ExportError: torch cannot trace or translate the module.
        UnsupportedError: No engine runs the result: a recurrent model in float16, an 8-bit cache of a model
            that cannot be said in the dialect `"onnxruntime"`.
        UnsupportedOptionError: An unknown option, an opset below 18, or an accuracy level that the
            operators do not have.
    """
    options = dict(request.options)
    opset = options.pop("opset", OPSET)
    accuracy_level = options.pop("accuracy_level", None)
    kv_cache_dtype = options.pop("kv_cache_dtype", "auto")
    products = options.pop("products", "auto")
    if options:
        raise UnsupportedOptionError(
            f"exporter 'onnx' has no option {sorted(options)[0]!r}; it has: opset, accuracy_level, kv_cache_dtype, "
            "products"
        )
    if kv_cache_dtype not in CACHE_DTYPES or (kv_cache_dtype != "auto" and request.target != FUSED):
        raise UnsupportedOptionError(
            f"kv_cache_dtype is {kv_cache_dtype!r} for the target {request.target!r}; expected one of "
            f"{', '.join(CACHE_DTYPES)}, and int8 only for target={FUSED!r}: ai.onnx has no attention with an "
            "8-bit cache. In eager mode: lmopt.Runtime(model, backend='torch', kv_cache_dtype='int8')"
        )
    if accuracy_level not in ACCURACY_LEVELS:
        raise UnsupportedOptionError(
            f"accuracy_level is {accuracy_level!r}; expected 1 (float32) or 4 (activations in 8 bits)"
        )
    if accuracy_level is not None and request.target != FUSED:
        raise UnsupportedOptionError(
            f"accuracy_level is of the target {FUSED!r}; the target asked for is {request.target!r}"
        )
    if not isinstance(opset, int) or opset < 18:
        raise UnsupportedOptionError(f"opset is {opset!r}; expected a whole number of at least 18")
    decoder = as_decoder(request.module, request.facts.source)
    _check_products(products, request.target, opset, pair=isinstance(decoder, EncoderDecoder))
    if isinstance(decoder, EncoderDecoder):
        from lmopt.backends.torch.export_encoder_decoder import export_both

        if kv_cache_dtype != "auto":
            raise UnsupportedOptionError(
                "kv_cache_dtype is for models without an encoder so far; leave it out"
            )
        return export_both(request, decoder, opset, accuracy_level, products)
    if request.target == FUSED:
        from lmopt.backends.torch.fused.export import fused_graph
        from lmopt.backends.torch.fused.reason import InexpressibleError

        try:
            model, signature, taps = fused_graph(
                decoder, context=request.facts.context_length, opset=opset, accuracy_level=accuracy_level
            )
        except InexpressibleError as reason:
            if kv_cache_dtype != "auto":
                raise UnsupportedError(
                    f"kv_cache_dtype={kv_cache_dtype!r} is of the dialect {FUSED!r}, which cannot hold this model: "
                    f"{reason}. In eager mode: lmopt.Runtime(model, backend='torch', kv_cache_dtype='int8')"
                ) from reason
            return {**_portable(request, decoder, opset), "fallback": str(reason)}
        asked: dict[str, Any] = {} if accuracy_level is None else {"accuracy_level": accuracy_level}
        if kv_cache_dtype == "int8":
            from lmopt.backends.torch.fused.cache import cache_scales, keep_in_int8

            scales = cache_scales(decoder, request.rows, request.facts.context_length)
            signature = keep_in_int8(model, signature, scales)
            asked["kv_cache_dtype"] = kv_cache_dtype
        return {**_write(request, model, signature, taps, opset, FUSED), **asked}
    return _portable(request, decoder, opset, products)


def _check_products(products: Any, target: str, opset: int, *, pair: bool) -> None:
    """Refuse products in 8 bits where nothing writes them."""
    known = PRODUCTS_OF_PAIRS if pair else PRODUCTS
    if products not in known:
        what = "an encoder-decoder" if pair else "a decoder"
        raise UnsupportedOptionError(
            f"products of {what} is {products!r}; expected one of {', '.join(known)}"
        )
    if products == "auto":
        return
    if pair and target != FUSED:
        raise UnsupportedOptionError(
            f"products={products!r} for the target {target!r}: of an encoder-decoder they are written for "
            f"target={FUSED!r}"
        )
    if not pair and target == FUSED:
        raise UnsupportedOptionError(
            f"products={products!r} is for target='portable' and TensorRT; on {FUSED!r} use accuracy_level=4 with "
            "quantized weights"
        )
    if opset < OPSET:
        raise UnsupportedOptionError(f"products={products!r} needs opset {OPSET} or more; opset is {opset}")


def _portable(request: ExportRequest, decoder: Decoder, opset: int, products: str = "auto") -> dict[str, Any]:
    with tracing_for("portable"):
        program, arguments = export_program(decoder, may_fix=True)
        model = translate(program, arguments, opset, type(request.module).__name__)
    del program
    taps = find_taps(model)
    finish_portable(model, opset)
    name_boundary(model, decoder.signature)
    fold(model)
    tidy(model)
    refuse_recurrent_halves(request.module, model)
    asked: dict[str, Any] = {}
    if products != "auto":
        ranges = ranges_of(decoder, request.rows, request.facts.context_length)
        asked = {"products": products, "quantized_products": quantize_products(model, products, ranges)}
    return {**_write(request, model, decoder.signature, taps, opset, "portable"), **asked}


def refuse_recurrent_halves(module: nn.Module, model: ir.Model) -> None:
    """Refuse a graph that would crash ONNX Runtime."""
    if dtype_name(module) == "float16" and (found := RECURRENT & {node.op_type for node in model.graph}):
        raise UnsupportedError(
            f"{type(module).__name__} in float16 becomes a graph with {sorted(found)[0]}, on which "
            "ONNX Runtime (1.31 and 1.32) crashes the process. Export it in float32."
        )


def _write(
    request: ExportRequest,
    model: ir.Model,
    signature: Signature,
    taps: dict[str, ir.Value],
    opset: int,
    target: str,
) -> dict[str, Any]:
    store_halves(model)
    ir.save(model, request.folder / GRAPH, external_data=DATA, size_threshold_bytes=1024)
    if target == FUSED:
        share_reshaped(request.folder / GRAPH)
    files = [name for name in (GRAPH, DATA) if (request.folder / name).exists()]
    if request.config:
        config = genai_config(request.config, request.facts, signature, shares_buffer=target == FUSED)
        (request.folder / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return {
        "files": files,
        "dtype": dtype_name(request.module),
        "operators": sorted({node.op_type for node in model.graph}),
        "opset": opset,
        "target": target,
        "taps": shown_taps(model, taps),
        **({"activations": bits} if (bits := rounded_bits(request.module)) else {}),
    }
