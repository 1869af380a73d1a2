"""Store the scales of quantized weights in 16 bits where that loses nothing.

Beside float32 activations, ONNX Runtime's operators want scales in float32. A GGUF file has them in 16 bits, and so do
most checkpoints: stored as they were, with a `Cast` that the engine folds when it loads the graph, a file in groups
of 32 is an eighth smaller, and what is computed is the same bit for bit.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

_OPERATORS: Final = frozenset({"MatMulNBits", "GatherBlockQuantized"})
# Place of the scales among the inputs of each.
_SCALES: Final = 2
# Below that, the node takes more room than it saves.
_LEAST: Final = 1024


def store_halves(model: ir.Model) -> None:
    """Let float32 scales that float16 holds exactly be stored so.

    Args:
        model: Changed in place.
    """
    graph = model.graph
    for node in list(graph):
        scales = node.inputs[_SCALES] if node.op_type in _OPERATORS else None
        if scales is None or not scales.is_initializer() or scales.is_graph_output():
            continue
        tensor = scales.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < _LEAST:
            continue
        wide = tensor.numpy()
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), wide):
            continue
        name = scales.name or ""
        stored = ir.Value(name=f"{name}.half", shape=scales.shape, type=ir.TensorType(ir.DataType.FLOAT16))
        stored.const_value = ir.tensor(half, name=stored.name)
        graph.register_initializer(stored)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value})
        widened = cast.outputs[0]
        widened.name, widened.shape, widened.type = f"{name}.wide", scales.shape, scales.type
        graph.insert_before(graph[0], cast)
        scales.replace_all_uses_with(widened)
        graph.initializers.pop(name)
