"""Change what TensorRT does not read in a portable graph, without changing a value that it computes.

TensorRT takes whole numbers before `DequantizeLinear` only, signed ones only, without a zero point, and 8-bit
ones with positive scales only. All that lmopt's layout can hold is still said exactly: the codes are
dequantized with a scale of one, and zero, scale and offset are applied in float32 by plain operators, in the
order in which the layout defines them. The codes stay packed in the engine.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lmopt.backends.tensorrt.best import add_best
from lmopt.backends.tensorrt.widening import widen
from lmopt.errors import UnsupportedError, UnsupportedPrecisionError
from lmopt.types import TensorSpec

GRAPH: Final = "prepared.onnx"
DATA: Final = "prepared.onnx.data"
_OWN_DOMAINS: Final = frozenset({"", "ai.onnx"})
_UNSIGNED: Final = {ir.DataType.UINT4: ml_dtypes.int4, ir.DataType.UINT8: np.int8}
_FOUR_BITS: Final = frozenset({ir.DataType.INT4, ir.DataType.UINT4})
_NAMES: Final = {ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.FLOAT4E2M1: "fp4"}
_MATRIX: Final = 2


@dataclass(frozen=True, slots=True)
class Prepared:
    """A graph that TensorRT can read.

    Attributes:
        path: The file; its external data lie beside it.
        inputs: Inputs with dtype and symbolic axes.
        outputs: Outputs, likewise.
        weights: How many quantized weights of each type it holds: `{"int4": 15}`.
        changes: What was changed: `{"widened": 5, "spelled out": 3, "best": 64}`.
    """

    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: dict[str, int]
    changes: dict[str, int]


def prepare(model: Path, folder: Path, *, best: int = 0) -> Prepared:
    """Read a graph of the portable dialect and write what TensorRT can read.

    Args:
        model: The `.onnx` file; external data beside it.
        folder: Existing folder to write to, where anything has to be changed.
        best: How many of the largest logits the graph is to find by itself; see `lmopt.backends.tensorrt.best`.

    Returns:
        The changed graph, or the given file itself where nothing had to be.

    Raises:
        UnsupportedPrecisionError: The graph computes in float64, which TensorRT would quietly round.
        UnsupportedError: It has operators of another domain than ONNX's own.
    """
    found = ir.load(model)
    graph = found.graph
    refuse_foreign(graph)
    refuse_doubles(graph)
    changes = {"widened": widen(graph), "spelled out": spell_out(graph), "best": add_best(graph, best)}
    weights: dict[str, int] = {}
    for node in graph:
        if node.op_type == "DequantizeLinear" and (codes := _constant(node.inputs[0])) is not None:
            name = _NAMES.get(codes.dtype, codes.dtype.name.lower())
            weights[name] = weights.get(name, 0) + 1
    path = model
    if any(changes.values()):
        path = folder / GRAPH
        ir.save(found, path, external_data=DATA, size_threshold_bytes=1024)
    return Prepared(path, _specs(graph.inputs), _specs(graph.outputs), weights, changes)


def refuse_foreign(graph: ir.Graph) -> None:
    """Refuse operators that are not the standard's.

    Raises:
        UnsupportedError: The first is named.
    """
    for node in graph.all_nodes():
        if node.domain not in _OWN_DOMAINS:
            raise UnsupportedError(
                f"node {node.name!r} is {node.domain}::{node.op_type}, which TensorRT does not have. Export the model "
                "in the dialect for all engines: lmopt.Exporter('onnx', target='portable')"
            )


def refuse_doubles(graph: ir.Graph) -> None:
    """Refuse float64, which TensorRT's parser takes and rounds to float32.

    Raises:
        UnsupportedPrecisionError: The first value or node is named.
    """
    doubles = [value.name for value in graph.inputs if value.dtype == ir.DataType.DOUBLE]
    doubles += [name for name, value in graph.initializers.items() if value.dtype == ir.DataType.DOUBLE]
    for node in graph.all_nodes():
        cast = node.attributes.get("to")
        made = cast is not None and cast.as_int() == ir.DataType.DOUBLE
        constant = node.attributes.get("value") if node.op_type == "Constant" else None
        stored = constant is not None and constant.as_tensor().dtype == ir.DataType.DOUBLE
        if made or stored or any(value.dtype == ir.DataType.DOUBLE for value in node.outputs):
            doubles.append(node.name or node.op_type)
    if doubles:
        raise UnsupportedPrecisionError(
            f"{doubles[0]!r} is in float64 ({len(doubles)} such values); TensorRT would round it to float32 without a "
            "word. Load the model in another type: lmopt.Model.from_pretrained(..., dtype='float32')"
        )


def spell_out(graph: ir.Graph) -> int:
    """Rewrite quantized weights of a form that TensorRT refuses; say how many there were.

    Weights only: activations that are quantized with a zero point are left for TensorRT to refuse.
    """
    count = 0
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        codes, scales = _constant(node.inputs[0]), _constant(node.inputs[1])
        zero = _constant(node.inputs[2]) if len(node.inputs) > _MATRIX else None
        if codes is None or scales is None or not _refused(codes, scales, zero):
            continue
        block = node.attributes.get("block_size")
        axis = node.attributes.get("axis")
        if block is None or axis is None or axis.as_int() % _MATRIX != 1 or len(codes.shape) != _MATRIX:
            continue  # another's layout: the parser names the node
        _Spelling(graph, node, block.as_int()).write(codes, scales.numpy(), zero)
        count += 1
    return count


def _refused(codes: Any, scales: Any, zero: Any) -> bool:
    """Say whether TensorRT refuses a quantized weight."""
    if codes.dtype in _UNSIGNED or (zero is not None and zero.numpy().astype(np.int16).any()):
        return True
    # Four bits may have scales of any sign.
    return codes.dtype not in _FOUR_BITS and not bool((scales.numpy().astype(np.float32) > 0).all())


class _Spelling:
    """Writes one weight as codes with the scale one, and what makes its values of them.

    Args:
        graph: The graph.
        node: `DequantizeLinear` over blocks of the last axis; it is replaced.
        block: Columns that share a scale.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, block: int) -> None:
        self._graph, self._node, self._block = graph, node, block
        source = node.inputs[0]
        assert source is not None
        self._name = source.name or node.name or "weight"

    def write(self, codes: Any, scales: NDArray[Any], zero: Any) -> None:
        """Put `scale * ((codes - shift) - (zero - shift))` in place of the node, with signed codes."""
        values = codes.numpy()
        rows, columns = values.shape
        groups = -(-columns // self._block)
        shift = 0
        if (signed := _UNSIGNED.get(codes.dtype)) is not None:
            shift = 8 if codes.dtype in _FOUR_BITS else 128
            values = (values.astype(np.int16) - shift).astype(signed)
        zeros = np.zeros(scales.shape, np.float32) if zero is None else zero.numpy().astype(np.float32)
        zeros -= shift
        exact = scales.astype(np.float32)
        if columns % self._block:
            # The last group is filled up, so that groups are an axis.
            values = np.pad(values.astype(np.int8), ((0, 0), (0, groups * self._block - columns))).astype(
                values.dtype
            )
        result = self._apply(
            "DequantizeLinear", [self._constant("codes", values), self._constant("one", np.float32(1))]
        )
        result = self._apply("Reshape", [result, self._sizes("groups", rows, groups, self._block)])
        if zeros.any():
            result = self._apply("Sub", [result, self._constant("zeros", zeros[..., None])])
        result = self._apply("Mul", [result, self._constant("scales", exact[..., None])])
        result = self._apply("Reshape", [result, self._sizes("matrix", rows, groups * self._block)])
        if columns % self._block:
            ends = [self._sizes(name, number) for name, number in (("from", 0), ("to", columns), ("axis", 1))]
            result = self._apply("Slice", [result, *ends])
        wanted = self._node.outputs[0].dtype or ir.DataType.from_numpy(scales.dtype)
        if wanted != ir.DataType.FLOAT:
            result = self._apply("Cast", [result], to=int(wanted))
            result.type = ir.TensorType(wanted)
        self._node.outputs[0].replace_all_uses_with(result)
        stored_before = [one for one in self._node.inputs if one is not None]
        self._graph.remove(self._node, safe=True)
        for one in stored_before:
            # TensorRT imports every initializer, used or not, and does not know unsigned four bits.
            if not one.uses() and one.name in self._graph.initializers:
                del self._graph.initializers[one.name]

    def _constant(self, suffix: str, values: Any) -> ir.Value:
        value = ir.Value(name=f"{self._name}.{suffix}")
        value.const_value = ir.tensor(np.asarray(values), name=value.name)
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
        self._graph.register_initializer(value)
        return value

    def _sizes(self, suffix: str, *sizes: int) -> ir.Value:
        return self._constant(suffix, np.array(sizes, np.int64))

    def _apply(self, operator: str, operands: list[ir.Value], **attributes: int) -> ir.Value:
        made = ir.node(operator, operands, attributes=attributes or None)
        made.name = f"{self._name}.{operator.lower()}.{operands[-1].name}"
        self._graph.insert_before(self._node, made)
        made.outputs[0].name = f"{made.name}.out"
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        return made.outputs[0]


def _constant(value: ir.Value | None) -> Any:
    """Give a constant's tensor, `None` where it is computed."""
    return None if value is None else value.const_value


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            one.name or "",
            "" if one.dtype is None else one.dtype.numpy().name,
            tuple(axis if isinstance(axis, int) else str(axis.value) for axis in one.shape or ()),
        )
        for one in values
    )
