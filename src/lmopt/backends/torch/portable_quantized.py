"""Turn quantized weights in a traced graph into the standard's `DequantizeLinear`, block by block."""

from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lmopt.backends.torch.quantized import STORED
from lmopt.compression.layout import Grid, QuantizedArray, unpack
from lmopt.errors import UnsupportedOptionError

# `block_size` and 4-bit types came with it.
_OPSET: Final = 21
# By whether four bits are enough, and whether codes are signed.
_TYPES: Final[dict[tuple[bool, bool], Any]] = {
    (True, True): ml_dtypes.int4,
    (True, False): ml_dtypes.uint4,
    (False, True): np.int8,
    (False, False): np.uint8,
}


def finish_portable(model: ir.Model, opset: int) -> None:
    """Write each `lmopt::Dequantize` in operators of `ai.onnx`.

    Codes become 4-bit (up to 4 bits) or 8-bit numbers, signed and without a zero point where the weight is
    symmetric, which is what TensorRT reads. The offsets of a grid that has them are added in float32.

    Raises:
        UnsupportedOptionError: The opset lacks what is needed.
    """
    shared: dict[tuple[int, ...], ir.Value] = {}
    for node in list(model.graph):
        if (node.domain, node.op_type) != ("lmopt", "Dequantize"):
            continue
        if opset < _OPSET:
            raise UnsupportedOptionError(f"quantized weights need opset {_OPSET} or more; opset is {opset}")
        inputs = [*node.inputs, *[None] * (len(STORED) - len(node.inputs))]
        key = tuple(0 if one is None else id(one) for one in inputs)
        if key not in shared:
            shared[key] = _write(model.graph, node, inputs)
        node.outputs[0].replace_all_uses_with(shared[key])
        model.graph.remove(node, safe=True)
    model.opset_imports.pop("lmopt", None)


def _write(graph: ir.Graph, node: ir.Node, inputs: list[ir.Value | None]) -> ir.Value:
    sizes = {name: node.attributes[name].as_int() for name in ("rows", "columns", "bits", "group_size")}
    grid = Grid(**sizes, zero=node.attributes["zero"].as_string())
    stored: dict[str, NDArray[Any]] = {}
    for name, value in zip(STORED, inputs, strict=True):
        if value is not None:
            assert value.const_value is not None
            stored[name] = value.const_value.numpy()
    array = QuantizedArray(grid, **stored)
    signed = grid.zero == "symmetric"
    kind = _TYPES[grid.bits <= 4, signed]
    padded = grid.groups * grid.group_size
    width = padded if array.offsets is not None else grid.columns
    source = inputs[0]
    assert source is not None
    # Initializers are named by the weight, before the first node that needs them.
    first = next(iter(graph))

    def constant(suffix: str, values: NDArray[Any]) -> ir.Value:
        value = ir.Value(name=f"{source.name}.{suffix}")
        value.const_value = ir.tensor(values, name=value.name)
        value.shape, value.type = ir.Shape(values.shape), ir.TensorType(value.const_value.dtype)
        graph.register_initializer(value)
        return value

    def apply(operator: str, operands: list[ir.Value], **attributes: int) -> ir.Value:
        made = ir.node(operator, operands, attributes=attributes or None)
        graph.insert_before(first, made)
        made.outputs[0].name = f"{source.name}.{operator.lower()}_{operands[-1].name}"
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        return made.outputs[0]

    codes = unpack(array.codes, grid).reshape(grid.rows, -1)[:, :width]
    if signed:
        codes = (codes.astype(np.int16) - grid.midpoint).astype(np.int8)
    operands = [constant("quantized", codes.astype(kind)), constant("scale", array.scales)]
    if array.zero_points is not None:
        operands.append(constant("zero_point", array.zero_points.astype(kind)))
    result = apply("DequantizeLinear", operands, axis=1, block_size=grid.group_size)
    result.shape = ir.Shape((grid.rows, width))
    if array.offsets is not None:
        groups = np.array([grid.rows, grid.groups, grid.group_size])
        result = apply("Reshape", [result, constant("groups", groups)])
        result = apply("Add", [result, constant("offset", array.offsets[..., None])])
        result = apply("Reshape", [result, constant("matrix", np.array([grid.rows, padded]))])
        if padded != grid.columns:
            ends = [np.array([0]), np.array([grid.columns]), np.array([1])]
            result = apply("Slice", [result, *(constant(f"cut_{n}", one) for n, one in enumerate(ends))])
        result.shape = ir.Shape((grid.rows, grid.columns))
    return result
