"""Compute the logits of chosen positions only: the last product is a fifth of reading a prompt with a small model."""

from typing import Any

from lmopt.signature import LOGITS
from lmopt_openvino.silent import ov

POSITIONS = "logits_positions"

_ELEMENTWISE = frozenset({"Add", "Convert", "Divide", "Multiply", "Subtract", "Tanh"})


def choose_positions(model: Any) -> bool:
    """Give the graph an input `logits_positions`, `(batch, chosen)` int64 columns whose logits are wanted.

    Args:
        model: OpenVINO model with the output `logits`; changed in place.

    Returns:
        Whether the end of the graph is a product that this could be put before; if not, nothing was changed.
    """
    (result,) = (one for one in model.outputs if LOGITS in one.get_names())
    node = result.get_node().input_value(0).get_node()
    while node.get_type_name() in _ELEMENTWISE:
        values = [one for one in node.input_values() if one.get_partial_shape().rank.get_length() == 3]
        if len(values) != 1:
            return False
        node = values[0].get_node()
    if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
        return False
    hidden = node.input_value(0)
    if hidden.get_partial_shape().rank.get_length() != 3:
        return False
    ops = ov.opset8
    positions = ops.parameter([-1, -1], ov.Type.i64, name=POSITIONS)
    positions.output(0).set_names({POSITIONS})
    chosen = ops.gather(hidden, positions, ops.constant(1, ov.Type.i64), batch_dims=1)
    node.input(0).replace_source_output(chosen.output(0))
    model.add_parameters([positions])
    model.validate_nodes_and_infer_types()
    return True
