"""Small edits of a graph that all steps after the trace share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lmopt.types import AnyArray


class Edits:
    """A graph under change, and which of its values show which module's output.

    Args:
        model: The model; changed in place.
        taps: Module path to value; kept true through all edits.
    """

    def __init__(self, model: ir.Model, taps: dict[str, ir.Value]) -> None:
        self.model = model
        self.graph = model.graph
        self.taps = taps
        self._constants: dict[tuple[str, bytes], ir.Value] = {}
        self._count = 0

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        before: ir.Node,
        *,
        domain: str = "",
        outputs: int = 1,
        like: ir.Node | None = None,
        **attributes: Any,
    ) -> ir.Node:
        """Insert a node.

        Args:
            operator: Its type.
            inputs: Its inputs.
            before: Where to insert it.
            domain: Domain of the type.
            outputs: Number of outputs.
            like: A node to take further attributes from.
            **attributes: Attributes by name.
        """
        carried = (
            [] if like is None else [one for one in like.attributes.values() if one.name not in attributes]
        )
        self._count += 1
        node = ir.node(
            operator,
            inputs,
            attributes=attributes or None,
            domain=domain,
            num_outputs=outputs,
            name=f"lmopt_{operator}_{self._count}",
        )
        for attribute in carried:
            node.attributes[attribute.name] = attribute
        for place, value in enumerate(node.outputs):
            value.name = f"{node.name}_{place}"
        self.graph.insert_before(before, node)
        return node

    def inserting(self, before: ir.Node) -> Callable[..., ir.Value]:
        """Give a function that inserts a node of one output there and gives the output."""

        def apply(operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
            return self.node(operator, inputs, before, **attributes).outputs[0]

        return apply

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let everything that reads or shows `old` read or show `new`."""
        if new.shape is None:
            new.shape = old.shape
        if new.type is None:
            new.type = old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        for path, value in self.taps.items():
            if value is old:
                self.taps[path] = new

    def constant(self, array: AnyArray, name: str) -> ir.Value:
        """Give a small constant, one for all equal ones."""
        key = str(array.dtype) + str(array.shape), array.tobytes()
        if key not in self._constants:
            self._constants[key] = self.initializer(
                f"lmopt_{name}_{len(self._constants)}", ir.tensor(np.array(array, order="C"))
            )
        return self._constants[key]

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a stored tensor."""
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
        tensor.name = name
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value


def lazily(tensor: Callable[[], AnyArray], like: ir.TensorProtocol, shape: Sequence[int]) -> ir.LazyTensor:
    """Describe a tensor that is computed when it is written, and forgotten then."""
    return ir.LazyTensor(lambda: ir.tensor(tensor(), dtype=like.dtype), like.dtype, ir.Shape(shape))


def share_equal(graph: ir.Graph) -> None:
    """Keep one of the initializers that are the same memory (tied weights)."""
    first: dict[tuple[Any, ...], ir.Value] = {}
    for value in list(graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        if raw is None or not hasattr(raw, "data_ptr") or raw.numel() == 0:
            continue
        key = raw.data_ptr(), tuple(raw.shape), raw.stride(), raw.dtype
        if key in first and not value.is_graph_output():
            value.replace_all_uses_with(first[key])
        first.setdefault(key, value)


def same_shape(left: ir.Value, right: ir.Value) -> bool:
    """Say whether two values surely have one shape: no axis of it is without a name."""
    return (
        left.shape is not None
        and right.shape is not None
        and list(left.shape) == list(right.shape)
        and all(isinstance(size, int) or size.value is not None for size in left.shape)
    )


def sums_with_constants(add: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Read an Add as a value of the sum's own shape and a constant that is added to it, as far as it is that."""
    for value, constant in (add.inputs, reversed(add.inputs)):
        if value is None or constant is None or constant.const_value is None:
            continue
        if same_shape(value, add.outputs[0]):
            yield value, constant


def is_linear(node: ir.Node) -> bool:
    """Say whether a node is a linear as the trace leaves it, with a float weight."""
    return (node.domain, node.op_type) == ("lmopt", "Linear")


def attributes_of(node: ir.Node, without: Sequence[str]) -> tuple[Any, ...]:
    """Give a node's attributes as something that can be compared."""
    return tuple(
        sorted((name, str(one.value)) for name, one in node.attributes.items() if name not in without)
    )
