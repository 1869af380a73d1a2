"""Drop what changes nothing (reshapes, transposes, slices, sums with zeros), and make other shapes constant."""

from typing import Final

import numpy as np
import onnx_ir as ir

from lmopt.backends.torch.fused.edits import Edits, same_shape, sums_with_constants

_LAST: Final = 2**31 - 1


def drop_idle(edits: Edits) -> None:
    """Bypass what gives its input back: alone, or together with the operator before it."""
    for node in list(edits.graph):
        origin = _origin(node)
        if origin is not None:
            edits.replace(node.outputs[0], origin)
        elif node.op_type == "Reshape" and (target := _constant_shape(node)) is not None:
            shape = edits.constant(np.array(target), "shape")
            reshaped = edits.node("Reshape", [node.inputs[0], shape], node)
            edits.replace(node.outputs[0], reshaped.outputs[0])


def _constant_shape(node: ir.Node) -> list[int] | None:
    """Write a reshape's target with 0 for sizes that stay in place and -1 for one that is free."""
    before, after = node.inputs[0], node.outputs[0]
    if before is None or before.shape is None or after.shape is None:
        return None
    target: list[int] = []
    for axis, size in enumerate(after.shape):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(before.shape) and size.value is not None and size == before.shape[axis]:
            target.append(0)
        else:
            target.append(-1)
    # A true size of 0 would be read as "stays".
    sound = target.count(-1) <= 1 and 0 not in [size for size in after.shape if isinstance(size, int)]
    return target if sound else None


def _origin(node: ir.Node) -> ir.Value | None:
    """Give the earlier value that a node's output is equal to, if any."""
    value = node.inputs[0] if node.inputs else None
    if value is None:
        return None
    if node.op_type == "Slice":
        return value if _takes_all(node) else None
    if node.op_type == "Reshape":
        # Reshapes keep the order of the entries, so equal shapes mean equal values.
        while value is not None:
            if same_shape(value, node.outputs[0]):
                return value
            before = value.producer()
            if before is None or before.op_type != "Reshape":
                return None
            value = before.inputs[0]
    if node.op_type == "Add":
        return _other_than_zeros(node)
    if node.op_type == "Transpose":
        before = value.producer() if value is not None else None
        if before is not None and before.op_type == "Transpose":
            first, second = (one.attributes["perm"].as_ints() for one in (before, node))
            if [first[axis] for axis in second] == list(range(len(first))):
                return before.inputs[0]
    return None


def _other_than_zeros(add: ir.Node) -> ir.Value | None:
    """Give what a constant of zeros is added to, as is an unused bias of logits, if it has the sum's shape."""
    for value, constant in sums_with_constants(add):
        tensor = constant.const_value
        if tensor is not None and not tensor.numpy().any():
            return value
    return None


def _takes_all(node: ir.Node) -> bool:
    numbers = [
        value.const_value.numpy() if value is not None and value.const_value is not None else None
        for value in node.inputs[1:]
    ]
    if len(numbers) < 2 or numbers[0] is None or numbers[1] is None:
        return False
    steps = numbers[3] if len(numbers) > 3 else None
    return bool(
        (numbers[0] == 0).all()
        and (numbers[1] >= _LAST).all()
        and (len(numbers) < 4 or (steps is not None and (steps == 1).all()))
    )
