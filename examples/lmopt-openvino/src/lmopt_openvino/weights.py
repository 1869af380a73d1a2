"""Keep quantized weights quantized.

OpenVINO reads `DequantizeLinear` with blocks as a chain that reshapes the codes before it converts them, and whose
last shape is computed. That chain is a constant, and it is folded: a model of 4 bits would take the memory, and the
time, of float32. The CPU plugin has products that read codes, scales and zero points as they are; they are chosen for

    codes (rows, groups, size) -> Convert -> [Subtract zero points] -> Multiply scales -> Reshape (rows, columns)

so the same constants are written in that form. Grids with a float offset, `scale * code + offset`, become
`scale * (code - zero)` with the float zero `-offset / scale`: the same up to the last digits of float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmopt_openvino.silent import ov

_CODES = (ov.Type.u4, ov.Type.i4, ov.Type.u8, ov.Type.i8)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A quantized matrix: constants of codes `(rows, columns)`, of scales and zeros `(rows, groups)`."""

    codes: Any
    scale: Any
    zero: Any
    rows: int
    groups: int
    columns: int


def keep_weights_small(model: Any) -> int:
    """Write every block-wise dequantization of constants so that OpenVINO does not fold it.

    Args:
        model: OpenVINO model; changed in place.

    Returns:
        How many weights have float zeros.
    """
    # A weight with offsets has one without inside, which the first pass takes out of the model.
    found = [_rewrite(model, change) for change in (_with_offsets, _without)]
    return found[0]


def _rewrite(model: Any, change: Callable[[Any], Any]) -> int:
    """Put the new form in the place of each weight that `change` knows; say how many there were."""
    found = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Reshape" and (small := change(node)) is not None:
            node.output(0).replace(small.output(0))
            found += 1
    return found


def _without(last: Any) -> Any:
    """The new form of a weight that ends in this node, or `None`."""
    weight = _weight(last)
    if weight is None:
        return None
    zero = None
    if weight.zero is not None:
        zero = ov.opset13.convert(_shaped(weight.zero, [weight.rows, weight.groups, 1]), ov.Type.f32)
    return _written(weight, zero)


def _with_offsets(last: Any) -> Any:
    """The same for a weight to which offsets are added before its groups become columns."""
    total = last.input_value(0).get_node()
    if total.get_type_name() != "Add":
        return None
    grouped, offset = (one.get_node() for one in total.input_values())
    if grouped.get_type_name() != "Reshape" or offset.get_type_name() != "Constant":
        return None
    weight = _weight(grouped.input_value(0).get_node())
    if weight is None or weight.zero is not None:
        return None
    scale = np.array(weight.scale.data)
    if list(offset.get_output_shape(0)) != [weight.rows, weight.groups, 1] or not scale.all():
        return None
    return _written(weight, ov.opset13.constant(-offset.data / scale[..., None]))


def _written(weight: _Weight, zero: Any) -> Any:
    """The form that the plugin looks for."""
    ops = ov.opset13
    shape = [weight.rows, weight.groups, weight.columns // weight.groups]
    small = ops.convert(_shaped(weight.codes, shape), ov.Type.f32)
    if zero is not None:
        small = ops.subtract(small, zero)
    small = ops.multiply(small, _shaped(weight.scale, [weight.rows, weight.groups, 1]))
    return ops.reshape(small, ops.constant([weight.rows, weight.columns], ov.Type.i64), special_zero=False)


def _weight(last: Any) -> _Weight | None:
    """Recognise one weight by the last node of what OpenVINO makes of `DequantizeLinear`."""
    if last.get_type_name() != "Reshape":
        return None
    product = last.input_value(0).get_node()
    if product.get_type_name() != "Multiply":
        return None
    first, scale = (one.get_node() for one in product.input_values())
    zero = None
    if first.get_type_name() == "Subtract":
        first, second = (one.get_node() for one in first.input_values())
        if (zero := _constant(second)) is None:
            return None
    codes, scale = _constant(first), _constant(scale)
    shape = last.get_output_partial_shape(0)
    if codes is None or scale is None or codes.get_element_type() not in _CODES or shape.is_dynamic:
        return None
    size, groups = list(shape.to_shape()), list(scale.get_output_shape(0))
    if not len(size) == len(groups) == 2 or size[0] != groups[0] or size[1] % groups[1]:
        return None
    if list(codes.get_output_shape(0)) != size or (zero and list(zero.get_output_shape(0)) != groups):
        return None
    return _Weight(codes, scale, zero, size[0], groups[1], size[1])


def _constant(node: Any) -> Any:
    """Follow a chain that only reshapes or converts up to its constant."""
    while node.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _shaped(constant: Any, shape: list[int]) -> Any:
    """The same numbers in another shape; codes of 4 bits stay packed in pairs."""
    numbers = np.array(constant.data).reshape(-1)
    if constant.get_element_type() in (ov.Type.u4, ov.Type.i4):
        # OpenVINO does not keep the array alive that a tensor of 4 bits looks into: the constant gets a copy.
        tensor = ov.Tensor(numbers.view(np.uint8), ov.Shape(shape), constant.get_element_type())
        return ov.opset13.constant(tensor, shared_memory=False)
    return ov.opset13.constant(numbers.reshape(shape))
