"""Write any decoder as one ONNX graph in the portable dialect: the `ai.onnx` domain only.

The graph takes the cache in and gives it out, so it serves prefill, several tokens at once and
single-token decoding, at any batch, length and past. torch traces the module; what is ours is the
calling convention, the names, the axes, and a tidy graph.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from lmopt.backends.torch.genai_config import genai_config
from lmopt.backends.torch.language_model import Decoder, as_decoder, dtype_name
from lmopt.backends.torch.tracing import export_program, plain_reason
from lmopt.contracts import ExportRequest
from lmopt.errors import ExportError, UnsupportedError, UnsupportedOptionError
from lmopt.signature import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from lmopt.types import BATCH, PAST, SEQUENCE, TOTAL, TensorSpec

# Opset 23 brings Attention, which TensorRT does not build in float32; 21 brings 4-bit weights.
OPSET: Final = 21
GRAPH: Final = "model.onnx"
DATA: Final = "model.onnx.data"
RECURRENT: Final = frozenset({"GRU", "LSTM", "RNN"})


def export_onnx(request: ExportRequest) -> Mapping[str, Any]:
    """Write `model.onnx`, its external data and `genai_config.json` into the staging folder.

    Args:
        request: See `lmopt.contracts.ExportRequest`. Options: `opset` (18 or more).

    Returns:
        What the manifest records: files, opset, target, and which graph value is the output of
        which module (`taps`), for finding where two engines part.

    Raises:
        ExportError: torch cannot trace or translate the module.
        UnsupportedError: No engine runs the result: a recurrent model in float16.
        UnsupportedOptionError: An option that is not `opset`, or an opset below 18.
    """
    options = dict(request.options)
    opset = options.pop("opset", OPSET)
    if options:
        raise UnsupportedOptionError(f"exporter 'onnx' has no option {sorted(options)[0]!r}; it has: opset")
    if not isinstance(opset, int) or opset < 18:
        raise UnsupportedOptionError(f"opset is {opset!r}; expected a whole number of at least 18")
    decoder = as_decoder(request.module)
    program, arguments = export_program(decoder, may_fix=True)
    with _quiet():
        try:
            translated = torch.onnx.export(
                program, arguments, opset_version=opset, optimize=False, verbose=False
            )
        except Exception as error:
            raise ExportError(
                f"torch cannot write {type(request.module).__name__} as ONNX: {plain_reason(error)}"
            ) from error
    assert translated is not None
    model = translated.model
    del program, translated
    taps = _find_taps(model)
    _name_boundary(model, decoder)
    _tidy(model)
    operators = sorted({node.op_type for node in model.graph})
    dtype = dtype_name(decoder)
    if dtype == "float16" and (recurrent := RECURRENT & set(operators)):
        raise UnsupportedError(
            f"{type(request.module).__name__} in float16 becomes a graph with {sorted(recurrent)[0]}, on which "
            "ONNX Runtime (1.31 and 1.32) crashes the process. Export it in float32."
        )
    ir.save(model, request.folder / GRAPH, external_data=DATA, size_threshold_bytes=1024)
    files = [name for name in (GRAPH, DATA) if (request.folder / name).exists()]
    if request.config:
        text = json.dumps(genai_config(request.config, request.facts, decoder.signature), indent=2)
        (request.folder / "genai_config.json").write_text(text + "\n")
    produced = {id(value) for node in model.graph for value in node.outputs}
    return {
        "files": files,
        "dtype": dtype,
        "operators": operators,
        "opset": opset,
        "target": request.target,
        "taps": [[name, value.name] for name, value in taps.items() if id(value) in produced],
    }


def _name_boundary(model: ir.Model, decoder: Decoder) -> None:
    """Give inputs and outputs the field's names and true axes.

    torch writes sizes of the sample into some output shapes (those of an LSTM, for one), so the
    axes come from the decoder's signature.
    """
    signature = decoder.signature
    inputs = [TensorSpec(INPUT_IDS, "int64", (BATCH, SEQUENCE))]
    if signature.has_mask:
        inputs.append(TensorSpec(ATTENTION_MASK, "int64", (BATCH, TOTAL)))
    if signature.has_positions:
        inputs.append(TensorSpec(POSITION_IDS, "int64", (BATCH, SEQUENCE)))
    inputs += [one.past for one in signature.state]
    after = [
        TensorSpec(
            one.present, one.past.dtype, tuple(TOTAL if axis == PAST else axis for axis in one.past.shape)
        )
        for one in signature.state
    ]
    dtype = model.graph.outputs[0].dtype
    assert dtype is not None
    outputs = [TensorSpec(LOGITS, dtype.numpy().name, (BATCH, SEQUENCE, signature.vocab_size)), *after]
    graph = model.graph
    if len(graph.inputs) != len(inputs) or len(graph.outputs) != len(outputs):
        raise ExportError(
            f"the traced graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, expected "
            f"{len(inputs)} and {len(outputs)}: an input does not reach the result (does the module use its "
            "state?)"
        )
    # A value may be input and output at once (a state that is handed through): give outputs their own.
    passes.OutputFixPass()(model)
    taken = {spec.name for spec in [*inputs, *outputs]}
    for node in graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{value.name}_inner"
    for value, spec in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = spec.name
        value.shape = ir.Shape(spec.shape)


def _tidy(model: ir.Model) -> None:
    """Fold what is constant, merge what is equal, drop what is unused."""
    optimizer.fold_constants(model, input_size_limit=2**12, output_size_limit=2**31)
    for step in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=False),
        passes.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    boundary = {id(value) for value in [*model.graph.inputs, *model.graph.outputs]}
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in boundary:
                value.shape = None
    model.producer_name, model.producer_version = "lmopt", ""
    model.graph.name = "decoder"


def _find_taps(model: ir.Model) -> dict[str, ir.Value]:
    """Map each module's path to the value that it hands on, in order of computation.

    That is the last value of the module's own that an operator outside of it reads; a state that
    only leaves the graph does not count.
    """
    inside = {id(node): set(_module_paths(node)) for node in model.graph}
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        for path in _module_paths(node):
            for value in node.outputs:
                readers = [inside.get(id(use.node), set()) for use in value.uses()]
                if value is model.graph.outputs[0] or any(path not in reader for reader in readers):
                    found.pop(path, None)
                    found[path] = value
    return found


def _module_paths(node: ir.Node) -> list[str]:
    """Read the paths of the modules that a node stands in out of torch's note on it."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    found = [scope.strip(" '\"") for scope in scopes.strip("[]").split(",")][:-1]
    # The wrapper that is traced calls the module itself `module`.
    return [scope.removeprefix("module.") for scope in found if scope.startswith("module.")]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's notes on itself off the user's screen."""
    names = ("torch.onnx._internal.exporter._registration", "torch.onnx", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
