"""A bfloat16 graph in float32: the same weights, as every bfloat16 number is a float32 one, computed more finely.

ONNX Runtime's CPU kernels do not multiply in bfloat16. What can be proved there of a bfloat16 graph is that it is the
right graph with the right weights; the rounding of its own type is the engine's that will run it.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np

from lmopt.errors import NotInstalledError
from lmopt.registry import pip_line

_TYPES: Final = frozenset({"to", "dtype", "output_dtype", "stash_type"})
"""Attributes that name a type by its number."""


def widen(model: Path, folder: Path) -> Path:
    """Write a graph with float32 in every place of bfloat16.

    Args:
        model: The `.onnx` file; external data beside it.
        folder: Existing folder to write to; it takes twice the room of the weights.

    Returns:
        The new file.

    Raises:
        NotInstalledError: onnx-ir is missing.
    """
    try:
        import onnx_ir as ir
    except ImportError as error:
        line = pip_line('"lmopt[onnx]"')
        raise NotInstalledError(f"widening a graph needs onnx-ir. Install it: {line}") from error
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT

    def widened(tensor: Any) -> Any:
        if tensor.dtype != narrow:
            return tensor

        def values() -> Any:
            return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

        # Made as it is written: a large model is not in memory twice.
        return ir.LazyTensor(values, dtype=wide, shape=tensor.shape, name=tensor.name)

    found = ir.load(model)
    for value in found.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = widened(value.const_value)
        _retype(value, narrow, wide, ir)
    for value in (*found.graph.inputs, *found.graph.outputs):
        _retype(value, narrow, wide, ir)
    for node in found.graph.all_nodes():
        for value in node.outputs:
            _retype(value, narrow, wide, ir)
        for name, attribute in list(node.attributes.items()):
            if name in _TYPES and attribute.as_int() == int(narrow):
                node.attributes[name] = ir.AttrInt64(name, int(wide))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow:
                wider = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[name] = ir.AttrTensor(name, wider)
    path = folder / model.name
    ir.save(found, path, external_data=f"{model.name}.data", size_threshold_bytes=1024)
    return path


def _retype(value: Any, narrow: Any, wide: Any, ir: Any) -> None:
    if value.dtype == narrow:
        value.type = ir.TensorType(wide)
