"""Let what works token by token skip the padding of sources of unequal length.

Between attentions an encoder treats each token alone. There its tokens lie in one matrix `(tokens, size)` without those
of padding; attention gets them back in rows, where a padded place holds some token, which the mask hides. A batch of
sources of 10 to 40 tokens computes two thirds of what it would.
"""

from collections.abc import Collection
from typing import Final

import numpy as np
import onnx_ir as ir

from lmopt.backends.torch.fused.edits import Edits
from lmopt.backends.torch.fused.operators import MULTI_HEAD, PADDING, VALUE
from lmopt.types import TOKENS

_ELEMENTWISE: Final = frozenset(
    {"Add", "Div", "Mul", "Pow", "Sub"}  # of two
    | {"Abs", "Cast", "Clip", "Erf", "Exp", "Neg", "Reciprocal", "Sqrt"}
    | {
        "Elu",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "QuickGelu",
        "Relu",
        "Sigmoid",
        "Softplus",
        "Tanh",
    }
)
_ALONG_SIZE: Final = frozenset(
    {
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
_REDUCING: Final = frozenset({"ReduceMax", "ReduceMean", "ReduceSum", "ReduceSumSquare"})
_PRODUCTS: Final = frozenset({"MatMul", "FusedMatMul", "MatMulNBits"})
_MOVING: Final = frozenset({"Reshape", "Transpose"})
_ROWS: Final = 3
_MATRIX: Final = 2


def skip_padding(edits: Edits, mask: ir.Value, hidden: Collection[ir.Value]) -> int:
    """Take the padding out of all that a graph computes token by token.

    Args:
        edits: The graph of an encoder; changed in place. Values that lose their padding have the axis `TOKENS`.
        mask: `(batch, source)`, 1 at tokens and 0 at padding.
        hidden: Outputs of the graph of which nobody reads what stands at padding: keys and values of attention.

    Returns:
        How many nodes skip it. 0, and the graph is as before, where there is no product among them, or others than
        attention read what they give: what these make of padding may matter (a convolution).
    """
    alone = _token_by_token(edits.graph, mask)
    left = [use for node in alone for value in node.outputs for use in value.uses() if use.node not in alone]
    safe = all(_looks_away(node, place, hidden) for node, place in left)
    if not safe or not any(node.op_type in _PRODUCTS for node in alone):
        return 0
    ranks = {node: rank for rank, node in enumerate(edits.graph)}
    apply = edits.inserting(edits.graph[0])
    flat = edits.constant(np.array([-1], np.int64), "flat")
    ones = apply("Cast", apply("Reshape", mask, flat), to=int(ir.DataType.INT64))
    tokens = apply("Squeeze", apply("NonZero", ones), edits.constant(np.array([0], np.int64), "first"))
    zero, one = (edits.constant(np.array(number, np.int64), "number") for number in (0, 1))
    # Padding takes the token before it; what stands before the first token takes that.
    nearest = apply("Max", apply("Sub", apply("CumSum", ones, zero), one), zero)
    places = apply("Reshape", nearest, apply("Shape", mask))
    packed: dict[ir.Value, ir.Value] = {}
    made = [value for node in alone for value in node.outputs]
    inside = set(made)
    for node in alone:
        for place, value in enumerate(node.inputs):
            if value is None or value.const_value is not None or value in inside:
                continue
            if value not in packed:
                assert value.shape is not None
                apply = edits.inserting(node)
                lines = apply(
                    "Reshape", value, edits.constant(np.array([-1, value.shape[2]], np.int64), "lines")
                )
                packed[value] = apply("Gather", lines, tokens, axis=0)
                packed[value].type = value.type
            node.replace_input_with(place, packed[value])
    for value in made:
        outside = [use for use in value.uses() if use.node not in alone]
        rows, size = value.shape, None if value.shape is None else value.shape[-1]
        value.shape = ir.Shape([TOKENS, size])
        if outside:
            taker = min((use.node for use in outside), key=ranks.__getitem__)
            whole = edits.node("Gather", [value, places], taker, axis=0).outputs[0]
            whole.type, whole.shape = value.type, rows
            for use in outside:
                use.node.replace_input_with(use.idx, whole)
    return len(alone)


def name_tokens(edits: Edits) -> None:
    """Let names of values that show modules end in `TOKENS` where they have that axis: files keep no shapes inside."""
    for value in dict.fromkeys(edits.taps.values()):
        if value.shape and value.shape[0] == TOKENS:
            value.name = f"{value.name}.{TOKENS}"


def _token_by_token(graph: ir.Graph, mask: ir.Value) -> dict[ir.Node, None]:
    """Find the nodes that read and give values `(batch, source, size)` and mix none of their tokens, in their order."""
    # torch does not always see that ids and mask are of one batch.
    batches = [value.shape[0] for value in graph.inputs if value.shape is not None]
    source = None if mask.shape is None else mask.shape[1]

    def is_rows(value: ir.Value) -> bool:
        shape = value.shape
        return (
            shape is not None
            and len(shape) == _ROWS
            and shape[0] in batches
            and shape[1] == source
            and isinstance(shape[2], int)
        )

    found: dict[ir.Node, None] = {}
    inside: set[ir.Value] = set()
    for node in graph:
        if node.outputs[0].is_graph_output() or not _keeps_apart(node):
            continue
        shown = [value for value in node.inputs if value is not None and value.const_value is None]
        # What a product gives has no shape in a trace where a bias is added to it.
        given = [value for value in node.outputs if value.shape is not None]
        if shown and all(value in inside or is_rows(value) for value in shown) and all(map(is_rows, given)):
            found[node] = None
            inside.update(node.outputs)
    return found


def _looks_away(node: ir.Node, place: int, hidden: Collection[ir.Value]) -> bool:
    """Say whether a reader of rows does not mind what stands at padding, nor who reads what it makes of them."""
    if node.op_type == MULTI_HEAD:
        return place <= VALUE and len(node.inputs) > PADDING and node.inputs[PADDING] is not None
    return node.op_type in _MOVING and all(
        (value in hidden or not value.is_graph_output())
        and all(_looks_away(use.node, use.idx, hidden) for use in value.uses())
        for value in node.outputs
    )


def _keeps_apart(node: ir.Node) -> bool:
    """Say whether a node does the same with each vector `(size,)` of what it reads, its constants being no rows."""
    constants = [value for value in node.inputs if value is not None and value.const_value is not None]
    vectors = all(len(value.const_value.shape) <= 1 for value in constants if value.const_value is not None)
    if node.op_type in _ELEMENTWISE:
        return vectors
    if node.op_type in _ALONG_SIZE:
        axis = node.attributes.get("axis")
        return vectors and (axis is None or axis.as_int() == -1)
    if node.op_type in _REDUCING:
        axes = node.inputs[1] if len(node.inputs) > 1 else None
        kept = node.attributes.get("keepdims")
        return (
            axes is not None
            and axes.const_value is not None
            and axes.const_value.numpy().tolist() == [-1]
            and (kept is None or kept.as_int() == 1)
        )
    if node.op_type in _PRODUCTS:
        matrix = node.inputs[1]
        return all(value is None or value.const_value is not None for value in node.inputs[1:]) and (
            node.op_type == "MatMulNBits"
            or (matrix is not None and matrix.shape is not None and len(matrix.shape) == _MATRIX)
        )
    return False
