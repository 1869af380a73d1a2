"""Find a row's largest logits on the device, so that only those come to the host.

A vocabulary of 128,256 in float16 takes 0.3 ms a row and token to copy, widen and search on a processor; sixty-four
numbers take a hundredth of that. Ties must not depend on a device's order of equals, and what follows may divide
scores by a temperature: where the sixty-four do not settle the matter, the whole line is taken.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from lmopt.signature import LOGITS
from lmopt.types import BATCH, FloatArray, IntArray

VALUES: Final = "best.values"
IDS: Final = "best.ids"
MOST: Final = 3840
"""Most entries that TensorRT's `TopK` gives."""
# Two float32 numbers further apart than this are so after a division by the same number, which rounds by 2**-24.
_APART: Final = np.float32(2.0**-20)
_LEAST: Final = np.float32(1e-30)


def add_best(graph: ir.Graph, count: int) -> int:
    """Give a graph the outputs `best.values` and `best.ids`, `(batch, count)`, of its last column of logits.

    NaN counts as infinity: a device may sort it anywhere, and nobody must take what it hides for an answer.

    Args:
        graph: With the output `logits`.
        count: How many; no more than the vocabulary has are given.

    Returns:
        How many are given, 0 where the graph has no such output.
    """
    logits = next((one for one in graph.outputs if one.name == LOGITS), None)
    vocab_size = None if logits is None or logits.shape is None else logits.shape[-1]
    if not count or logits is None or not isinstance(vocab_size, int):
        return 0
    count = min(count, vocab_size)

    def constant(name: str, value: object) -> ir.Value:
        made = ir.Value(name=f"best.{name}")
        made.const_value = ir.tensor(np.asarray(value), name=made.name)
        made.shape, made.type = made.const_value.shape, ir.TensorType(made.const_value.dtype)
        graph.register_initializer(made)
        return made

    def apply(operator: str, *operands: ir.Value, outputs: int = 1, **attributes: int) -> list[ir.Value]:
        made = ir.node(operator, operands, attributes=attributes or None, num_outputs=outputs)
        made.name = f"best.{operator.lower()}"
        graph.append(made)
        for place, value in enumerate(made.outputs):
            value.name = f"{made.name}.{place}"
        return list(made.outputs)

    (line,) = apply("Gather", logits, constant("column", np.int64(-1)), axis=1)
    if logits.dtype != ir.DataType.FLOAT:
        (line,) = apply("Cast", line, to=int(ir.DataType.FLOAT))
    (broken,) = apply("IsNaN", line)
    (line,) = apply("Where", broken, constant("infinity", np.float32(np.inf)), line)
    found = apply("TopK", line, constant("count", np.array([count], np.int64)), outputs=2, axis=-1)
    for value, name, kind in zip(found, (VALUES, IDS), (ir.DataType.FLOAT, ir.DataType.INT64), strict=True):
        value.name, value.type, value.shape = name, ir.TensorType(kind), ir.Shape([BATCH, count])
        graph.outputs.append(value)
    return count


def settled(
    values: FloatArray, ids: IntArray, count: int, vocab_size: int
) -> tuple[FloatArray, IntArray] | None:
    """Cut a row's largest logits down to what `lmopt.contracts.SupportsBest.forward_best` hands out.

    Args:
        values: `(n,)` float32, the largest of the row in any order.
        ids: `(n,)` int64, whose they are.
        count: How many are wanted; those that tie, or nearly, with the last of them come too.
        vocab_size: Length of the whole line.

    Returns:
        Logits and ids, ids ascending; `None` where others of the line may belong to them, or NaN is in it.
    """
    if count > values.size or not values.max() < np.inf:
        return None
    last = np.partition(values, values.size - count)[values.size - count]
    kept = np.flatnonzero(values >= last - (_APART * abs(last) + _LEAST))
    if kept.size == values.size < vocab_size:
        return None
    kept = kept[ids[kept].argsort()]
    return values[kept], ids[kept]
