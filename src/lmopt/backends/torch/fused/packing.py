"""Join linears that read the same value into one, and cut columns out of weights instead of results.

A linear is `lmopt::Linear`, or `MatMulNBits` as a quantized linear emits it: in both, whatever belongs
to one output column is one row of each weight, so that packing and cutting are the same for both.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import onnx_ir as ir

from lmopt.backends.torch.fused.edits import Edits, attributes_of, is_linear, lazily
from lmopt.backends.torch.fused.operators import MICROSOFT
from lmopt.types import AnyArray

_QUANTIZED: Final = "MatMulNBits"


def cut_columns(edits: Edits) -> None:
    """Turn columns of a linear's output into a linear with those rows of the weight."""
    for node in list(edits.graph):
        if node.op_type != "Columns":
            continue
        source = node.inputs[0]
        assert source is not None
        linear = source.producer()
        index = np.array(node.attributes["index"].as_ints())
        if linear is None or not _is_product(linear):
            gathered = edits.node("Gather", [source, edits.constant(index, "columns")], node, axis=-1)
            edits.replace(node.outputs[0], gathered.outputs[0])
            continue
        edits.replace(node.outputs[0], _build(edits, [(linear, index)], node).outputs[0])


def pack(edits: Edits) -> None:
    """Join linears that read the same value: a layer's queries, keys and values, its gate and up."""
    joined: set[int] = set()
    for node in list(edits.graph):
        if node.op_type == "GroupQueryAttention":
            linears = [value.producer() if value is not None else None for value in node.inputs[:3]]
            if all(one is not None and _is_product(one) for one in linears):
                joined.add(id(_join(edits, [one for one in linears if one is not None])))
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in edits.graph:
        # Attention reads its packed linear whole: nothing else may come into it.
        if _is_product(node) and id(node) not in joined and not _is_head(node):
            groups.setdefault((id(node.inputs[0]), *_kind(node)), []).append(node)
    for members in groups.values():
        _join(edits, members)
    for node in list(edits.graph):
        if node.op_type == "GroupQueryAttention":
            _feed_packed(node)


def _join(edits: Edits, members: list[ir.Node]) -> ir.Node | None:
    members = list(dict.fromkeys(members))
    if len(members) < 2 or len({(id(one.inputs[0]), *_kind(one)) for one in members}) > 1:
        return None
    # In the graph's order the first member comes first; its input is ready there.
    order = {id(node): place for place, node in enumerate(edits.graph)}
    first = min(members, key=lambda one: order[id(one)])
    packed = _build(edits, [(one, None) for one in members], first)
    sizes = np.array([_width(one) for one in members])
    split = edits.node(
        "Split", [packed.outputs[0], edits.constant(sizes, "sizes")], first, outputs=len(members), axis=-1
    )
    for one, part in zip(members, split.outputs, strict=True):
        edits.replace(one.outputs[0], part)
        edits.graph.remove(one, safe=True)
    return packed


def _feed_packed(node: ir.Node) -> None:
    """Hand the packed result itself to an attention that would read its three parts."""
    query = node.inputs[0]
    assert query is not None
    split = query.producer()
    if split is None or split.op_type != "Split" or tuple(node.inputs[:3]) != tuple(split.outputs):
        return
    node.replace_input_with(0, split.inputs[0])
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)


def _is_product(node: ir.Node) -> bool:
    quantized = (node.domain, node.op_type) == (MICROSOFT, _QUANTIZED)
    return (quantized or is_linear(node)) and all(
        value is None or value.const_value is not None for value in node.inputs[1:]
    )


def _is_head(node: ir.Node) -> bool:
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    return before is not None and before.op_type == "LastTokens"


def _kind(node: ir.Node) -> tuple[object, ...]:
    """Say what two linears must share to be packed."""
    present = tuple(
        (value.const_value.dtype, _rows(node, place, value.const_value).shape[1:])
        if value is not None and value.const_value is not None
        else None
        for place, value in enumerate(node.inputs)
        if place > 0
    )
    return node.op_type, attributes_of(node, without=("N",)), present


class _Rows:
    """Rows of a weight, one an output column, read when needed."""

    def __init__(self, tensor: ir.TensorProtocol, transposed: bool) -> None:
        self._tensor = tensor
        self._transposed = transposed
        shape = tuple(int(size) for size in tensor.shape)
        self.shape = shape[::-1] if transposed else shape

    def read(self) -> AnyArray:
        array: AnyArray = self._tensor.numpy()
        return array.T if self._transposed else array


def _rows(node: ir.Node, place: int, tensor: ir.TensorProtocol) -> _Rows:
    stored = node.attributes.get("stored_transposed")
    return _Rows(tensor, transposed=place == 1 and stored is not None and bool(stored.as_int()))


def _width(node: ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    return _rows(node, 1, weight.const_value).shape[0]


def _build(edits: Edits, parts: list[tuple[ir.Node, AnyArray | None]], before: ir.Node) -> ir.Node:
    """Make one linear of chosen rows of several."""
    like = parts[0][0]
    inputs: list[ir.Value | None] = [like.inputs[0]]
    width = sum(_width(one) if index is None else len(index) for one, index in parts)
    for place, value in enumerate(like.inputs):
        if place == 0:
            continue
        if value is None:
            inputs.append(None)
            continue
        assert value.const_value is not None
        pieces: list[tuple[_Rows, AnyArray | None]] = []
        for one, index in parts:
            member = one.inputs[place]
            assert member is not None
            assert member.const_value is not None
            pieces.append((_rows(one, place, member.const_value), index))
        shape = (width, *pieces[0][0].shape[1:])
        tensor = lazily(_stack(pieces), value.const_value, shape)
        inputs.append(edits.initializer(f"{value.name}.packed_{len(edits.graph.initializers)}", tensor))
    changed = {"stored_transposed": 0} if is_linear(like) else {"N": width}
    return edits.node(like.op_type, inputs, before, domain=like.domain, like=like, **changed)


def _stack(pieces: list[tuple[_Rows, AnyArray | None]]) -> Callable[[], AnyArray]:
    def stack() -> AnyArray:
        arrays = [rows.read() if index is None else rows.read()[index] for rows, index in pieces]
        stacked: AnyArray = np.concatenate(arrays) if len(arrays) > 1 else np.ascontiguousarray(arrays[0])
        return stacked

    return stack
