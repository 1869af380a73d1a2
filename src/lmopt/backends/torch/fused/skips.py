"""Let a norm add the residual that it reads: one operator for an Add and the norm behind it.

Of norms without a mean alone: ONNX Runtime's `SkipLayerNormalization` takes three times as long as `Add` and
`LayerNormalization` where rows are many, and as long where there is one.
"""

from typing import Final

import onnx_ir as ir

from lmopt.backends.torch.fused.edits import Edits, is_linear, sums_with_constants
from lmopt.backends.torch.fused.operators import MICROSOFT

_SUM: Final = 3


def join_skips(edits: Edits) -> None:
    """Replace each Add of two whole hidden states whose sum a norm reads."""
    for norm in list(edits.graph):
        if norm.op_type != "SimplifiedLayerNormalization":
            continue
        total = norm.inputs[0]
        assert total is not None
        add = total.producer()
        if add is None or add.op_type != "Add" or not _is_residual(add):
            continue
        left, right = add.inputs
        # The norm stands where the Add stood, before any other reader of the sum.
        left, right, bias = _take_bias(edits, left, right)
        weight = norm.inputs[1]
        joined = edits.node(
            "SkipSimplifiedLayerNormalization",
            [left, right, weight] if bias is None else [left, right, weight, bias],
            add,
            domain=MICROSOFT,
            outputs=_SUM + 1,
            epsilon=norm.attributes["epsilon"].as_float(),
        )
        joined.outputs[1].name = joined.outputs[2].name = ""
        edits.replace(norm.outputs[0], joined.outputs[0])
        edits.graph.remove(norm, safe=True)
        edits.replace(total, joined.outputs[_SUM])
        edits.graph.remove(add, safe=True)


def _is_residual(add: ir.Node) -> bool:
    """Say whether an Add joins two values of its own full shape, `(batch, sequence, hidden)`."""
    shapes = [value.shape for value in (*add.inputs, add.outputs[0]) if value is not None]
    whole = shapes[-1]
    return (
        whole is not None
        and len(whole) == 3
        and all(one is not None and list(one) == list(whole) for one in shapes)
        and not any(value is not None and value.const_value is not None for value in add.inputs)
    )


def _take_bias(
    edits: Edits, left: ir.Value | None, right: ir.Value | None
) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    """Take the bias off one linear that nothing else reads: the norm adds it as well."""
    for value, other in ((right, left), (left, right)):
        linear = value.producer() if value is not None else None
        if linear is None or len(list(linear.outputs[0].uses())) != 1:
            continue
        if is_linear(linear) and len(linear.inputs) == 3:
            bare = edits.node("Linear", linear.inputs[:2], linear, domain="lmopt", like=linear)
            bare.outputs[0].shape, bare.outputs[0].type = linear.outputs[0].shape, linear.outputs[0].type
            product, bias = bare.outputs[0], linear.inputs[2]
        else:
            product, bias = _sum_with_vector(linear)
        if product is None:
            continue
        for path in [path for path, shown in edits.taps.items() if shown is linear.outputs[0]]:
            # What the module returned, bias and all, is no value of the graph any more.
            del edits.taps[path]
        return other, product, bias
    return left, right, None


def _sum_with_vector(add: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Take a value and a constant vector apart that a node adds, which is how a linear's bias may leave a trace."""
    if add.op_type == "Add" and not add.outputs[0].is_graph_output():
        for value, constant in sums_with_constants(add):
            if constant.const_value is not None and len(constant.const_value.shape) == 1:
                return value, constant
    return None, None
