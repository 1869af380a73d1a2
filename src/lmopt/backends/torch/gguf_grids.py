"""Put the grids of a GGUF file into a model that was loaded from it in float.

Which tensor is which weight is gguf's own table of names; that it is, and whether its rows are in
another order (llama.cpp permutes those of rotated queries and keys), is seen by its values: they must equal
the float weight's bit by bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray

from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.quantizing import Weight, find_weights, replace_weights
from lmopt.compression.gguf_blocks import NAMES, from_gguf
from lmopt.compression.layout import QuantizedArray
from lmopt.errors import UnsupportedError
from lmopt.safefiles import GgufHeader, read_tensor
from lmopt.types import FloatArray

_CHECKED_ROWS: Final = 64


def keep_grids(path: Path, header: GgufHeader, module: Any) -> Any:
    """Replace float weights by the codes, scales and offsets that they were dequantized from.

    Args:
        path: The file.
        header: Its header.
        module: The model in float32; it is changed.

    Returns:
        The model itself, with quantized parts. A weight of a type without such a form stays in float, which is
        its exact value too.

    Raises:
        UnsupportedError: No weight could be kept.
    """
    config = module.config.get_text_config(decoder=True)
    names = _names(header, config.num_hidden_layers)
    heads = {
        one
        for one in (config.num_attention_heads, getattr(config, "num_key_value_heads", None))
        if isinstance(one, int) and one > 0
    }

    def grid_of(weight: Weight, values: FloatArray) -> QuantizedArray | None:
        name = f"{names.get_name(weight.path)}.weight"
        tensor = header.tensors.get(name)
        if tensor is None or tensor.type not in NAMES or tensor.shape != values.shape[::-1]:
            return None
        array = from_gguf(tensor.type, read_tensor(path, header, name), *values.shape)
        return _ordered(array, values, heads)

    replace_weights(module, find_weights(module, config.vocab_size), grid_of)
    if not quantized_parts(module):
        types = sorted({tensor.type for tensor in header.tensors.values()})
        raise UnsupportedError(
            f"{path} holds no quantized weight that lmopt can carry over (types {types}; it knows "
            f"{', '.join(NAMES.values())}). Load it dequantized: leave keep_quantization out."
        )
    return module


def _names(header: GgufHeader, layers: int) -> Any:
    stated = header.metadata.get("general.architecture")
    architecture = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == stated), None)
    if architecture is None:
        raise UnsupportedError(
            f"gguf knows no names of the architecture {stated!r}, so its weights cannot be told apart. Update "
            "it: pip install --upgrade gguf"
        )
    return gguf.get_tensor_name_map(architecture, layers)


def _ordered(array: QuantizedArray, values: FloatArray, heads: set[int]) -> QuantizedArray | None:
    """Bring rows into the order of the float weight; `None` where no known order gives its values."""
    found = array.values()
    rows = len(values)
    orders: list[NDArray[np.int64]] = [np.arange(rows)]
    # Halves of a head's rows next to each other in the model, in turn in the file.
    orders += [
        np.arange(rows).reshape(count, -1, 2).swapaxes(1, 2).reshape(-1)
        for count in sorted(heads)
        if rows % (2 * count) == 0
    ]
    for order in orders:
        sample = order[:_CHECKED_ROWS]
        if np.array_equal(found[sample], values[:_CHECKED_ROWS]) and np.array_equal(found[order], values):
            stored: Mapping[str, NDArray[Any]] = {k: one[order] for k, one in array.arrays().items()}
            return QuantizedArray(array.grid, **stored)
    return None
