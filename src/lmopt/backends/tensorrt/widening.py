"""Compute norms and softmax of half-precision graphs in float32, where sums of squares and of powers need the range."""

from typing import Final

import onnx_ir as ir

HALF: Final = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
WIDENED: Final = frozenset(
    {
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "RMSNormalization",
        "LogSoftmax",
        "Softmax",
    }
)
"""Operators whose insides are sums over an axis of squares or powers."""


def widen(graph: ir.Graph) -> int:
    """Put casts around norms and softmax that are in a half type; say how many there were.

    TensorRT is strongly typed: an operator computes in the type of its inputs, and a sum of squares overflows
    float16 at 65504. Norms that a model writes out itself are in float32 already where its author had them so.
    """
    count = 0
    for node in list(graph):
        if node.op_type not in WIDENED or node.domain not in {"", "ai.onnx"}:
            continue
        half = next(
            (one.dtype for one in (*node.inputs, *node.outputs) if one is not None and one.dtype in HALF),
            None,
        )
        if half is None or any(value.is_graph_output() for value in node.outputs):
            continue
        if "stash_type" in node.attributes:  # the type of a norm's insides
            node.attributes["stash_type"] = ir.AttrInt64("stash_type", int(ir.DataType.FLOAT))
        for place, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(place, _cast(graph, value, ir.DataType.FLOAT, before=node))
        for value in node.outputs:
            uses = list(value.uses())
            if not uses:
                continue
            value.type = ir.TensorType(ir.DataType.FLOAT)
            narrow = _cast(graph, value, half, after=node)
            for use in uses:
                use.node.replace_input_with(use.idx, narrow)
        count += 1
    return count


def _cast(
    graph: ir.Graph,
    value: ir.Value,
    to: ir.DataType,
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": int(to)})
    place = before if before is not None else after
    assert place is not None
    node.name = f"{place.name}.cast.{value.name}"
    node.outputs[0].name = f"{node.name}.out"
    node.outputs[0].type = ir.TensorType(to)
    node.outputs[0].shape = value.shape
    if before is not None:
        graph.insert_before(before, node)
    else:
        graph.insert_after(place, node)
    return node.outputs[0]
