"""Write an encoder-decoder as two ONNX graphs: what runs once for a source, and what runs once a token.

The encoder's graph also computes what the decoder makes of the encoder's outputs once, the keys and values of
cross-attention; so no step of the decoder computes anything of the source again.
"""

from typing import Any, Final

import onnx_ir as ir

from lmopt.backends.torch.encoder_decoder import EncoderDecoder
from lmopt.backends.torch.export_onnx import refuse_recurrent_halves
from lmopt.backends.torch.graph import fold, name_boundary, name_encoder, tidy, translate
from lmopt.backends.torch.language_model import dtype_name
from lmopt.backends.torch.lowering import tracing_for
from lmopt.backends.torch.portable_quantized import finish_portable
from lmopt.backends.torch.tracing import export_encoder, export_program
from lmopt.contracts import ExportRequest

ENCODER: Final = "encoder_model.onnx"
DECODER: Final = "decoder_model.onnx"


def export_both(request: ExportRequest, decoder: EncoderDecoder, opset: int) -> dict[str, Any]:
    """Write `encoder_model.onnx` and `decoder_model.onnx` with their external data, in the portable dialect.

    Returns:
        What the manifest records of the format.

    Raises:
        ExportError: torch cannot trace or translate the module.
        UnsupportedError: No engine runs the result.
    """
    name = type(request.module).__name__
    operators: set[str] = set()
    files: list[str] = []
    for file in (ENCODER, DECODER):
        with tracing_for("portable"):
            trace = export_encoder if file == ENCODER else export_program
            program, arguments = trace(decoder, may_fix=True)
            model = translate(program, arguments, opset, name)
        del program
        finish_portable(model, opset)
        if file == ENCODER:
            name_encoder(model, decoder.signature, decoder.source)
        else:
            name_boundary(model, decoder.signature)
        fold(model)
        tidy(model, file.partition("_")[0])
        refuse_recurrent_halves(request.module, model)
        data = f"{file}.data"
        ir.save(model, request.folder / file, external_data=data, size_threshold_bytes=1024)
        files += [one for one in (file, data) if (request.folder / one).exists()]
        operators |= {node.op_type for node in model.graph}
    return {
        "files": files,
        "encoder": ENCODER,
        "decoder": DECODER,
        "dtype": dtype_name(request.module),
        "operators": sorted(operators),
        "opset": opset,
        "target": "portable",
        "taps": [],
    }
