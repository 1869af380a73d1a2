"""Let a graph make its tables of cosines and sines when it is loaded, where that gives the numbers but for rounding.

A table has a row for each position that the model can read: those of SmolLM2, of 8,192 positions, take 2 of the 110 MB
of its 4-bit file. Runtimes compute what is constant once, when they load a graph; that takes time and memory where a
file would be mapped, so that large tables stay in it.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from lmopt.backends.torch.fused.edits import Edits
from lmopt.backends.torch.fused.operators import MICROSOFT
from lmopt.types import AnyArray, FloatArray

_COS, _SIN = 7, 8
"""Inputs of GroupQueryAttention."""
_LEAST_BYTES: Final = 1 << 16
"""Tables below this are not worth the operators."""
_MOST_BYTES: Final = 1 << 23
"""Tables above this stay: those of 131,072 positions by 64 take ONNX Runtime 0.6 s and 0.3 GB more while it loads."""
_NEAR: Final = np.array([0, -1, 1, -2, 2, -3, 3, -4, 4], np.int32)
"""Float32 numbers beside an estimate that are tried, counted from it; of equally good ones the nearest is taken."""
_LAST: Final = 64
"""Positions by which neighbouring frequencies are told apart: the last, where they are furthest from each other."""


def compute_tables(edits: Edits) -> None:
    """Put the frequencies in the place of tables that follow from them.

    Args:
        edits: A finished graph; changed in place.
    """
    made: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}
    for node in list(edits.graph):
        if (node.domain, node.op_type) != (MICROSOFT, "GroupQueryAttention") or len(node.inputs) <= _SIN:
            continue
        cos, sin = node.inputs[_COS], node.inputs[_SIN]
        if cos is None or sin is None:
            continue
        if (cos, sin) not in made:
            made[cos, sin] = _computed(edits, cos, sin)
        if (found := made[cos, sin]) is not None:
            node.replace_input_with(_COS, found[0])
            node.replace_input_with(_SIN, found[1])


def frequencies_of(cos: FloatArray, sin: FloatArray) -> tuple[FloatArray, float] | None:
    """Find what a table was made from, if it is `scale * cos(position * frequency)` in float32.

    Args:
        cos: `(positions, columns)` float32.
        sin: Likewise.

    Returns:
        `(columns,)` float32 frequencies and the scale that give the table to within two
        units of rounding of the scale; `None` if none do.
    """
    if len(cos) < 2 or cos.dtype != np.float32 or not cos[0, 0] > 0:
        return None
    scale = float(cos[0, 0])
    estimate = np.arctan2(sin[1].astype(np.float64), cos[1].astype(np.float64)).astype(np.float32)
    if not (estimate > 0).all():
        return None
    # Rounding of the two entries leaves the estimate a few numbers from the frequency itself.
    tried = (estimate.view(np.int32)[None] + _NEAR[:, None]).view(np.float32)
    positions = np.arange(len(cos), dtype=np.float32)
    tables, last = ((np.cos, cos), (np.sin, sin)), slice(-_LAST, None)
    errors = [
        sum(
            np.abs(_table(function, positions[last], one, scale) - table[last]).sum(axis=0)
            for function, table in tables
        )
        for one in tried
    ]
    best = tried[np.argmin(errors, axis=0), np.arange(cos.shape[1])]
    rounding = 2 * np.spacing(np.float32(scale))
    exact = all(
        np.abs(_table(function, positions, best, scale) - table).max() <= rounding
        for function, table in tables
    )
    return (best, scale) if exact else None


def _table(function: np.ufunc, positions: FloatArray, frequencies: FloatArray, scale: float) -> FloatArray:
    """Compute a table as the graph will: angles in float32, all else in float64."""
    angles = (positions[:, None] * frequencies[None]).astype(np.float64)
    return np.asarray(function(angles) * scale).astype(np.float32)


def _computed(edits: Edits, cos: ir.Value, sin: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    if cos.const_value is None or sin.const_value is None:
        return None
    if not _LEAST_BYTES <= cos.const_value.nbytes <= _MOST_BYTES:
        return None
    arrays: list[AnyArray] = [cos.const_value.numpy(), sin.const_value.numpy()]
    if (found := frequencies_of(*arrays)) is None:
        return None
    frequencies, scale = found
    apply = edits.inserting(next(iter(edits.graph)))
    ends = [
        edits.constant(np.array(value, np.float32), name)
        for value, name in ((0, "start"), (len(arrays[0]), "positions"), (1, "step"))
    ]
    positions = apply("Unsqueeze", apply("Range", *ends), edits.constant(np.array([1]), "one"))
    angles = apply("Mul", positions, edits.constant(frequencies[None], "frequencies"))
    angles = apply("Cast", angles, to=ir.DataType.DOUBLE.value)
    tables = []
    for operator in ("Cos", "Sin"):
        table = apply(operator, angles)
        if scale != 1:
            table = apply("Mul", table, edits.constant(np.array(scale), "scale"))
        tables.append(apply("Cast", table, to=ir.DataType.FLOAT.value))
    return tables[0], tables[1]
