"""Turn what is left of the domain `lmopt` into operators, and lay the boundary."""

from typing import Final

import numpy as np
import onnx_ir as ir

from lmopt.backends.torch.fused.edits import Edits, is_linear, lazily
from lmopt.backends.torch.fused.operators import MICROSOFT
from lmopt.signature import ATTENTION_MASK, LOGITS_TO_KEEP

_END: Final = np.iinfo(np.int64).max
_INT32: Final = ir.DataType.INT32.value


def finish_linears(edits: Edits) -> None:
    """Store each weight as `(in, out)`, so that no Transpose remains and ONNX Runtime prepacks it.

    A weight that something else reads too (a tied embedding) stays as it is, once.
    """
    turned: dict[ir.Value, ir.Value] = {}
    for node in list(edits.graph):
        if not is_linear(node):
            continue
        x, weight, *rest = node.inputs
        assert weight is not None
        assert weight.const_value is not None
        tensor = weight.const_value
        if node.attributes["stored_transposed"].as_int():
            product = edits.node("MatMul", [x, weight], node)
        elif not all(is_linear(use.node) for use in weight.uses()):
            product = edits.node("FusedMatMul", [x, weight], node, domain=MICROSOFT, transB=1)
        else:
            if weight not in turned:
                turned[weight] = edits.initializer(f"{weight.name}.t", _turned(tensor))
            product = edits.node("MatMul", [x, turned[weight]], node)
        result = product.outputs[0]
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        if rest:
            result = edits.node("Add", [result, rest[0]], node).outputs[0]
        edits.replace(node.outputs[0], result)
        edits.graph.remove(node, safe=True)


def _turned(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    shape = [int(size) for size in reversed(tensor.shape)]
    return lazily(lambda: np.ascontiguousarray(tensor.numpy().T), tensor, shape)


def finish_boundary(edits: Edits) -> None:
    """Derive lengths from `attention_mask`, and keep as many last positions as `logits_to_keep` says.

    The mask counts each row's past and the width of the call; new tokens are the width for every row.
    """
    graph = edits.graph
    first = next(iter(graph))
    ids, positions, lengths, total, new, *state = graph.inputs
    mask = ir.Value(name=ATTENTION_MASK, type=ir.TensorType(ir.DataType.INT64))
    one = edits.constant(np.array([1]), "one")
    apply = edits.inserting(first)
    tokens = apply("ReduceSum", mask, one, keepdims=0)
    edits.replace(lengths, apply("Cast", apply("Sub", tokens, one), to=_INT32))
    edits.replace(total, apply("Cast", apply("Gather", apply("Shape", mask), one, axis=0), to=_INT32))
    width = apply("Cast", apply("Shape", ids, start=1), to=_INT32)
    edits.replace(new, apply("Expand", width, apply("Shape", ids, end=1)))
    keep = edits.initializer(LOGITS_TO_KEEP, ir.tensor(np.array([0])))
    for node in list(graph):
        if node.op_type != "LastTokens":
            continue
        # -0 starts at the first position: nothing is cut.
        start = edits.node("Neg", [keep], node)
        inputs = [node.inputs[0], start.outputs[0], edits.constant(np.array([_END]), "end"), one]
        edits.replace(node.outputs[0], edits.node("Slice", inputs, node).outputs[0])
        graph.remove(node, safe=True)
    # Where a size is read off the positions, the ids say it as well.
    for use in list(positions.uses()):
        if use.node.op_type == "Shape":
            use.node.replace_input_with(use.idx, ids)
    graph.inputs[:] = [ids, mask, *([positions] if list(positions.uses()) else []), *state, keep]
