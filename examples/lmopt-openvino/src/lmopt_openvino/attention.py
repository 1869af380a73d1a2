"""Let OpenVINO keep keys and values itself, and attend in one operator.

A portable graph takes the past as ordinary inputs and gives it back one step longer: each token copies all
that was ever read. OpenVINO's CPU plugin has an operator that appends to a cache of its own in place. It is used
for a graph of this form (see the plugin's `StatefulSDPAFusion`):

    ReadValue -> Gather(rows) -> Concat(new) -> [repeat heads] -> ScaledDotProductAttention(mask, scale)
                                     `-> Assign

so the attention that lmopt exports, two products with a softmax between, is written as that. The mask stays the
graph's own. What is not recognised, in all layers, stays as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmopt.signature import Signature
from lmopt_openvino.silent import ov

ROWS = "rows"
"""Input: `(batch,)` int32, the row of the cache that each row of the call goes on from."""

_END = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Layer:
    """One attention, as found; values are outputs of nodes."""

    query: Any
    keys: Any
    values: Any
    mask: Any
    scale: Any
    result: Any
    groups: int


def keep_cache_inside(model: Any, signature: Signature) -> bool:
    """Rewrite every attention of a graph and make its cache a part of the request.

    Args:
        model: OpenVINO model; changed in place, and only if all of it is recognised.
        signature: Of the graph.

    Returns:
        Whether it was.
    """
    if not signature.rewinds or not signature.has_mask:
        return False
    layers = [one for node in model.get_ops() if node.get_type_name() == "Softmax" and (one := _layer(node))]
    pasts = {name for one in layers for cache in (one.keys, one.values) if (name := _past_name(cache))}
    if pasts != {one.past.name for one in signature.state} or len(pasts) != 2 * len(layers):
        return False
    if any(one.batch_axis != 0 or one.past_axis != 2 for one in signature.state):
        return False
    for one in layers:
        one.result.replace(_attend(one))
    _remember(model, signature)
    return True


def _attend(layer: _Layer) -> Any:
    """Write one attention as a single operator."""
    ops = ov.opset13
    return ops.scaled_dot_product_attention(
        layer.query,
        _repeated(layer.keys, layer.groups),
        _repeated(layer.values, layer.groups),
        layer.mask,
        layer.scale,
        causal=False,
    ).output(0)


def _repeated(cache: Any, groups: int) -> Any:
    """Repeat each key-value head for its group of query heads; OpenVINO does it without a copy."""
    if groups == 1:
        return cache
    ops = ov.opset13
    _, heads, _, width = cache.get_partial_shape()
    grouped = ops.unsqueeze(cache, ops.constant(2, ov.Type.i64))
    spread = ops.broadcast(
        grouped, ops.constant([1, 1, groups, 1, 1], ov.Type.i64), broadcast_spec="BIDIRECTIONAL"
    )
    shape = [0, heads.get_length() * groups, -1, width.get_length()]
    return ops.reshape(spread, ops.constant(shape, ov.Type.i64), special_zero=True)


def _remember(model: Any, signature: Signature) -> None:
    """Turn inputs and outputs of the state into variables of the request, read through `ROWS`."""
    ops = ov.opset13
    rows = ops.parameter([-1], ov.Type.i32, name=ROWS)
    rows.output(0).set_names({ROWS})
    zero = ops.constant(0, ov.Type.i64)
    (ids,) = (one for one in model.inputs if "input_ids" in one.get_names())
    batch = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant([0], ov.Type.i64), zero)
    sinks, variables = [], []
    for one in signature.state:
        (past,) = (port for port in model.inputs if one.past.name in port.get_names())
        (present,) = (port for port in model.outputs if one.present in port.get_names())
        parameter, result = past.get_node(), present.get_node()
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = (
            past.get_partial_shape(),
            ov.Type.f32,
            one.past.name,
        )
        variable = ov.op.util.Variable(info)
        rest = ops.constant(np.array([one.past.shape[1], 0, one.past.shape[3]]), ov.Type.i64)
        nothing = ops.broadcast(ops.constant(0.0, ov.Type.f32), ops.concat([batch, rest], 0))
        read = ov.op.read_value(nothing, variable)
        picked = ops.gather(read, rows, zero)
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(picked.output(0))
        sinks.append(ov.op.assign(result.input_value(0).get_node(), variable))
        variables.append(variable)
        model.remove_parameter(parameter)
        model.remove_result(result)
    model.add_parameters([rows])
    model.add_variables(variables)
    model.add_sinks(sinks)
    model.validate_nodes_and_infer_types()


def _layer(softmax: Any) -> _Layer | None:
    """Recognise one attention by its softmax."""
    scores = softmax.input_value(0).get_node()
    product = _only_target(softmax.output(0), skip=("Convert",))
    if scores.get_type_name() != "Add" or product is None or product.get_type_name() != "MatMul":
        return None
    for scaled, mask in (scores.input_values(), scores.input_values()[::-1]):
        if scaled.get_node().get_type_name() != "Multiply":
            continue
        raw, scale = scaled.get_node().input_values()
        first = raw.get_node()
        if first.get_type_name() != "MatMul" or scale.get_node().get_type_name() != "Constant":
            continue
        keys, transposed = _cache(first.input_value(1))
        transposed ^= first.get_attributes()["transpose_b"]
        values, straight = _cache(product.input_value(1))
        if keys is None or values is None or not transposed or straight or scale.get_node().data.size != 1:
            return None
        query = first.input_value(0)
        groups = 1
        if query.get_partial_shape().rank.get_length() == 5:
            # (batch, key-value heads, group, new, width): the same numbers in the same order as in four axes.
            group = query.get_partial_shape()[2]
            targets = product.output(0).get_target_inputs()
            if group.is_dynamic or any(one.get_node().get_type_name() != "Reshape" for one in targets):
                return None
            groups, query = group.get_length(), query.get_node().input_value(0)
            mask = _up(mask, "Unsqueeze")
        if any(one.get_partial_shape().rank.get_length() != 4 for one in (query, mask)):
            return None
        number = ov.opset13.constant(scale.get_node().data.reshape(()).item(), ov.Type.f32).output(0)
        return _Layer(query, keys, values, mask, number, product.output(0), groups)
    return None


def _cache(value: Any) -> tuple[Any, bool]:
    """Follow an operand of a product up to the cache it is made of; say whether it is transposed on the way."""
    transposed = False
    while (node := value.get_node()).get_type_name() != "Concat":
        kind = node.get_type_name()
        if kind == "Transpose":
            order = list(node.input_value(1).get_node().data)
            if (
                transposed
                or order[:-2] != list(range(len(order) - 2))
                or order[-2:] != [len(order) - 1, len(order) - 2]
            ):
                return None, False
            transposed = True
        elif kind != "Unsqueeze" and not (kind == "Slice" and _takes_all(node)):
            return None, False
        value = node.input_value(0)
    if node.get_attributes()["axis"] not in (2, -2) or len(node.input_values()) != 2:
        return None, False
    return value, transposed


def _up(value: Any, *kinds: str) -> Any:
    """Step over nodes that add an axis or take all."""
    node = value.get_node()
    if node.get_type_name() in kinds:
        value = node.input_value(0)
    while value.get_node().get_type_name() == "Slice" and _takes_all(value.get_node()):
        value = value.get_node().input_value(0)
    return value


def _takes_all(node: Any) -> bool:
    """Whether a Slice leaves its input as it is."""
    bounds = [one.get_node() for one in node.input_values()[1:4]]
    if any(one.get_type_name() != "Constant" for one in bounds):
        return False
    start, stop, step = (one.data for one in bounds)
    return bool((start == 0).all() and (stop >= _END).all() and (step == 1).all())


def _only_target(output: Any, skip: tuple[str, ...]) -> Any:
    targets = list(_targets(output))
    if len(targets) != 1:
        return None
    node = targets[0]
    return _only_target(node.output(0), skip) if node.get_type_name() in skip else node


def _targets(output: Any) -> Iterator[Any]:
    return (one.get_node() for one in output.get_target_inputs())


def _past_name(cache: Any) -> str:
    """Name of the graph's input that a cache begins with, `""` if it does not."""
    source = cache.get_node().input_value(0)
    return source.get_any_name() if source.get_node().get_type_name() == "Parameter" else ""
