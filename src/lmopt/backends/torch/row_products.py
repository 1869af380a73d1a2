"""Write products with weights in 8 bits, a scale for each output and one for each token, for ONNX Runtime.

Each token's vector `x` is rounded to `q = round(x / s)`, `s = max|x| / 127`, each output's weights likewise, and
`q @ codes` is a sum of whole numbers, exact in 32 bits, so that a row is the same alone and among others. ONNX Runtime
multiplies `uint8` with `int8` by AMX or VNNI, where `MatMulNBits` uses neither with many rows; what is added
around a product are plain operators, of which all products of one input share all but two.

Where few rows are read and a matrix is small, these operators take longer than the product: there it is one
`MatMulNBits`, which rounds each token's vector and each output's weights in blocks of up to 256 columns, as finely at
least (docs/results/matmulnbits-kernels.md).

Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339 (section 2.1, vector-wise quantization); it is what CTranslate2 calls
int8.
"""

from collections.abc import Collection
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from lmopt.backends.torch.fused.edits import Edits
from lmopt.backends.torch.fused.operators import MICROSOFT
from lmopt.backends.torch.matmulnbits import INT8_ACTIVATIONS, largest_block
from lmopt.types import AnyArray, FloatArray

_MOST: Final = 127
# What zero is in `uint8`: kernels take no signed activations.
_MIDDLE: Final = 128
_TINY: Final = 1e-30
# Smaller weights gain nothing.
_LEAST: Final = 1 << 10
# Up to here the operators around a product of 16 rows take as long as the product.
_SMALL: Final = 1 << 20
_MATRIX: Final = 2


def multiply_in_int8(edits: Edits, vocabularies: Collection[int], *, few_rows: bool) -> int:
    """Rewrite the products of a graph with constant matrices, and the look-ups of tokens.

    Args:
        edits: The graph; changed in place.
        vocabularies: Rows that a table of tokens has; other tables stay, positions above all.
        few_rows: Whether it mostly reads a token of each row at a time.

    Returns:
        How many products were rewritten.
    """
    read: dict[int, tuple[ir.Value, ir.Value]] = {}
    count = 0
    for node in list(edits.graph):
        matrix = _matrix(node)
        if matrix is None:
            continue
        count += 1
        if few_rows and matrix.size <= _SMALL and (block := largest_block(len(matrix))):
            _multiply_in_blocks(edits, node, matrix, block)
            continue
        activation, weight = node.inputs[:2]
        assert activation is not None
        assert weight is not None
        if id(activation) not in read:
            read[id(activation)] = _rounded(edits, activation, node)
        rounded, factor = read[id(activation)]
        codes, scales = round_columns(matrix)
        product = edits.node(
            "MatMulIntegerToFloat",
            [
                rounded,
                _stored(edits, f"{weight.name}.int8", codes),
                edits.constant(np.array(1, np.float32), "one"),
                _stored(edits, f"{weight.name}.scale", scales / np.float32(_MOST)),
                edits.constant(np.array(_MIDDLE, np.uint8), "middle"),
            ],
            node,
            domain=MICROSOFT,
        )
        result = edits.node("Mul", [product.outputs[0], factor], node)
        for one in (product, result):
            one.outputs[0].type, one.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        edits.replace(node.outputs[0], result.outputs[0])
        edits.graph.remove(node, safe=True)
    for table in [one.inputs[0] for one in edits.graph if one.op_type == "Gather"]:
        tensor: Any = None if table is None else table.const_value
        if table is not None and _is_large(tensor) and tensor.shape[0] in vocabularies:
            _look_up(edits, table)
    return count


def round_columns(matrix: FloatArray) -> tuple[AnyArray, FloatArray]:
    """Round a matrix `(inputs, outputs)` to 8 bits: int8 codes and `(outputs,)` float32 scales."""
    scales = _scales(matrix, 0)
    return np.rint(matrix / scales).astype(np.int8), scales


def round_blocks(matrix: FloatArray, block: int) -> tuple[AnyArray, FloatArray]:
    """Round a matrix `(inputs, outputs)` to 8 bits in blocks of inputs, as `MatMulNBits` reads it.

    Returns:
        uint8 codes `(outputs, blocks, block)`, whose zero is 128, and float32 scales `(outputs, blocks)`.
    """
    blocks = np.ascontiguousarray(matrix.T).reshape(matrix.shape[1], -1, block)
    scales = _scales(blocks, 2)
    return (np.rint(blocks / scales[..., None]) + _MIDDLE).astype(np.uint8), scales


def _scales(values: FloatArray, axis: int) -> FloatArray:
    """Give the steps that hold values along an axis in 8 bits; of zeros, any."""
    scales = np.abs(values).max(axis=axis) / np.float32(_MOST)
    return np.where(scales > 0, scales, np.float32(1)).astype(np.float32)


def _multiply_in_blocks(edits: Edits, node: ir.Node, matrix: FloatArray, block: int) -> None:
    """Write one product as `MatMulNBits`; ONNX Runtime adds a bias in it when it loads the graph."""
    activation, weight = node.inputs[:2]
    assert weight is not None
    codes, scales = round_blocks(matrix, block)
    product = edits.node(
        "MatMulNBits",
        [
            activation,
            _stored(edits, f"{weight.name}.blocks", codes),
            _stored(edits, f"{weight.name}.blocks_scale", scales),
        ],
        node,
        domain=MICROSOFT,
        K=len(matrix),
        N=matrix.shape[1],
        bits=8,
        block_size=block,
        accuracy_level=INT8_ACTIVATIONS,
    )
    edits.replace(node.outputs[0], product.outputs[0])
    edits.graph.remove(node, safe=True)


def _matrix(node: ir.Node) -> FloatArray | None:
    """Give the constant `(inputs, outputs)` float32 matrix that a node multiplies by, if it is one of these."""
    turned = node.op_type == "FusedMatMul"
    if node.op_type not in ("MatMul", "FusedMatMul") or len(node.inputs) < _MATRIX:
        return None
    weight = node.inputs[1]
    tensor: Any = None if weight is None else weight.const_value
    if not _is_large(tensor):
        return None
    matrix: FloatArray = tensor.numpy()
    return matrix.T if turned else matrix


def _is_large(tensor: Any) -> bool:
    """Say whether a constant is a float32 matrix that is worth it."""
    return (
        tensor is not None
        and tensor.dtype == ir.DataType.FLOAT
        and len(tensor.shape) == _MATRIX
        and tensor.shape[0] * tensor.shape[1] >= _LEAST
    )


def _rounded(edits: Edits, value: ir.Value, before: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Round each token's vector; give `uint8` codes and its largest magnitude `(..., 1)`."""
    apply = edits.inserting(before)
    last = edits.constant(np.array([-1], np.int64), "last")
    # Of a vector of zeros any scale will do but 0.
    most = apply(
        "Max",
        apply("ReduceMax", apply("Abs", value), last, keepdims=1),
        edits.constant(np.array(_TINY, np.float32), "tiny"),
    )
    step = edits.constant(np.array(1 / _MOST, np.float32), "step")
    middle = edits.constant(np.array(_MIDDLE, np.uint8), "middle")
    return apply("QuantizeLinear", apply("Div", value, most), step, middle), most


def _look_up(edits: Edits, table: ir.Value) -> None:
    """Let a table hold codes, one scale a row."""
    tensor = table.const_value
    reads = [one.node for one in table.uses() if one.node.op_type == "Gather" and one.idx == 0]
    if tensor is None or not reads or len(reads) < len(list(table.uses())):
        return
    codes, scales = round_columns(tensor.numpy().T)
    rows = _stored(edits, f"{table.name}.rows", np.ascontiguousarray(codes.T))
    factors = _stored(edits, f"{table.name}.rows_scale", scales[:, None])
    for node in reads:
        ids = node.inputs[1]
        assert ids is not None
        found = edits.node("Gather", [rows, ids], node, axis=0)
        widened = edits.node("Cast", [found.outputs[0]], node, to=int(ir.DataType.FLOAT))
        factor = edits.node("Gather", [factors, ids], node, axis=0)
        result = edits.node("Mul", [widened.outputs[0], factor.outputs[0]], node)
        edits.replace(node.outputs[0], result.outputs[0])
        edits.graph.remove(node, safe=True)


def _stored(edits: Edits, name: str, array: AnyArray) -> ir.Value:
    known = edits.graph.initializers.get(name)
    return known if known is not None else edits.initializer(name, ir.tensor(np.ascontiguousarray(array)))
