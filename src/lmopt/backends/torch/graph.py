"""What both dialects do with a graph that torch has traced: names, a tidy up, and taps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.numpy_helper import to_array
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from lmopt.backends.torch.decomposing import decomposed_in_place
from lmopt.backends.torch.promoting import promoted_where_needed
from lmopt.backends.torch.quieting import quiet
from lmopt.backends.torch.registering import known_operators
from lmopt.backends.torch.tracing import plain_reason, unencumbered
from lmopt.errors import ExportError
from lmopt.signature import (
    ATTENTION_MASK,
    INPUT_FEATURES,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    Signature,
    source_name,
)
from lmopt.types import BATCH, PAST, SEQUENCE, SOURCE, TOTAL, SourceFacts, TensorSpec

# The wrappers that are traced call the module itself so.
_WRAPPERS: Final = ("module.", "decoder.module.")


def name_boundary(model: ir.Model, signature: Signature, more_inputs: Sequence[TensorSpec] = ()) -> None:
    """Give inputs and outputs the field's names and true axes.

    torch writes sizes of the sample into some output shapes (those of an LSTM, for one), so the
    axes come from the signature.

    Args:
        model: Its inputs are ids, mask, positions and state, as far as the signature has them.
        signature: Names and axes.
        more_inputs: Inputs that come after these.

    Raises:
        ExportError: An input does not reach the result.
    """
    inputs = [*inputs_of(signature), *more_inputs]
    after = [
        TensorSpec(
            one.present, one.past.dtype, tuple(TOTAL if axis == PAST else axis for axis in one.past.shape)
        )
        for one in signature.changing
    ]
    dtype = model.graph.outputs[0].dtype
    assert dtype is not None
    outputs = [TensorSpec(LOGITS, dtype.numpy().name, (BATCH, SEQUENCE, signature.vocab_size)), *after]
    _name(model, inputs, outputs)


def inputs_of(signature: Signature) -> list[TensorSpec]:
    """List the inputs of a decoder's graph, in order, with their true axes."""
    inputs = [TensorSpec(INPUT_IDS, "int64", (BATCH, SEQUENCE))]
    if signature.has_mask:
        inputs.append(TensorSpec(ATTENTION_MASK, "int64", (BATCH, TOTAL)))
    if signature.has_positions:
        inputs.append(TensorSpec(POSITION_IDS, "int64", (BATCH, SEQUENCE)))
    return [*inputs, *(one.past for one in signature.state)]


def name_encoder(model: ir.Model, signature: Signature, source: SourceFacts) -> None:
    """Give inputs and outputs of an encoder the field's names and true axes; see `name_boundary`."""
    outputs = [replace(one.past, name=source_name(one.past.name)) for one in signature.from_source]
    _name(model, encoder_inputs(model, signature, source), outputs)


def encoder_inputs(model: ir.Model, signature: Signature, source: SourceFacts) -> list[TensorSpec]:
    """List names and axes of what an encoder's graph takes."""
    axis: int | str = source.length if source.fixed and source.length else SOURCE
    if source.kind == "ids":
        inputs = [TensorSpec(INPUT_IDS, "int64", (BATCH, axis))]
    else:
        dtype = model.graph.inputs[0].dtype
        assert dtype is not None
        inputs = [TensorSpec(INPUT_FEATURES, dtype.numpy().name, (BATCH, source.size, axis))]
    if signature.has_source_mask:
        inputs.append(TensorSpec(ATTENTION_MASK, "int64", (BATCH, axis)))
    return inputs


def translate(
    program: torch.export.ExportedProgram, arguments: tuple[Any, ...], opset: int, what: str
) -> ir.Model:
    """Translate a traced program into ONNX operators.

    Args:
        program: From `lmopt.backends.torch.tracing`.
        arguments: What it was traced with.
        opset: Version of the operators.
        what: Class of the module, for the message.

    Raises:
        ExportError: torch knows no translation.
    """
    try:
        return as_operators(program, arguments, opset)
    except Exception as error:
        raise ExportError(f"torch cannot write {what} as ONNX: {plain_reason(error)}") from error


def as_operators(program: torch.export.ExportedProgram, arguments: tuple[Any, ...], opset: int) -> ir.Model:
    """Do what `translate` does, with torch's own errors."""
    with quiet(), unencumbered(), known_operators(), decomposed_in_place(), promoted_where_needed():
        translated = torch.onnx.export(program, arguments, opset_version=opset, optimize=False, verbose=False)
    assert translated is not None
    model: ir.Model = translated.model
    return model


def _name(model: ir.Model, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
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


def fold(model: ir.Model) -> None:
    """Compute what is constant."""
    optimizer.fold_constants(model, input_size_limit=2**12, output_size_limit=2**31)


def tidy(model: ir.Model, name: str = "decoder") -> None:
    """Merge what is equal, drop what is unused."""
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
    model.graph.name = name


def share_reshaped(path: Path) -> None:
    """Let a tensor that the graph reads in two shapes be stored once, and be mapped twice.

    ONNX Runtime would compute the other shape when it loads the graph, which is a copy in memory, of the whole
    embedding where that is quantized and tied to the head.

    Args:
        path: A graph whose weights lie in a file beside it; rewritten in place.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    stored = {one.name: one for one in graph.initializer}
    shown = {one.name for one in graph.output}
    idle: set[str] = set()
    for node in list(graph.node):
        if node.op_type != "Reshape" or not all(name in stored for name in node.input):
            continue
        tensor, shape = (stored[name] for name in node.input)
        if tensor.data_location != onnx.TensorProto.EXTERNAL or node.output[0] in shown:
            continue
        other = graph.initializer.add()
        other.CopyFrom(tensor)
        other.name = node.output[0]
        # 0 keeps an axis, -1 is what is left.
        sizes = [size or tensor.dims[axis] for axis, size in enumerate(to_array(shape).tolist())]
        other.dims[:] = np.empty(list(tensor.dims), bool).reshape(sizes).shape
        idle.update(node.input)
        graph.node.remove(node)
    for name in idle.difference(*(node.input for node in graph.node)):
        graph.initializer.remove(stored[name])
    path.write_bytes(model.SerializeToString(deterministic=True))


def find_taps(model: ir.Model) -> dict[str, ir.Value]:
    """Map each module's path to the value that it hands on, in order of computation.

    That is the last value of the module's own that an operator outside of it reads; a state that
    only leaves the graph does not count.
    """
    inside = {id(node): set(module_paths(node)) for node in model.graph}
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        for path in module_paths(node):
            for value in node.outputs:
                readers = [inside.get(id(use.node), set()) for use in value.uses()]
                if value is model.graph.outputs[0] or any(path not in reader for reader in readers):
                    found.pop(path, None)
                    found[path] = value
    return found


def shown_taps(model: ir.Model, taps: dict[str, ir.Value]) -> list[list[str]]:
    """List the taps whose value the graph still computes, as the manifest records them."""
    produced = {id(value) for node in model.graph for value in node.outputs}
    return [[path, value.name or ""] for path, value in taps.items() if id(value) in produced]


def module_paths(node: ir.Node) -> list[str]:
    """Read the paths of the modules that a node stands in out of torch's note on it."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    found = [scope.strip(" '\"") for scope in scopes.strip("[]").split(",")][:-1]
    inside = [scope.removeprefix("decoder.") for scope in found if scope.startswith(_WRAPPERS)]
    return [scope.removeprefix("module.") for scope in inside]
