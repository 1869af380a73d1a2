"""Read weights in the format of the compressed-tensors library, which llm-compressor writes and vLLM runs.

`pack-quantized` stores a linear of N outputs and K inputs as

- `weight_packed`, int32 `(N, ceil(K * bits / 32))`: codes, as signed numbers plus `2 ** (bits - 1)`, along K,
- `weight_scale`, `(N, groups)`; one group, `(N, 1)`, is the strategy "channel",
- `weight_zero_point`, where the grid has one, int32 `(ceil(N * bits / 32), groups)`: packed along N,
- `weight_shape`, int64 `[N, K]`.

`int-quantized` has `weight` as int8 `(N, K)` and, unpacked too, `weight_zero_point`. See
`compressed_tensors/compressors/` of https://github.com/vllm-project/compressed-tensors (0.20).
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from lmopt.backends.torch.bitstreams import (
    from_stream,
    read_scales,
    read_words,
    unpack_stream,
    whole_row,
    words,
)
from lmopt.compression.layout import Codes, QuantizedArray
from lmopt.errors import CorruptArtifactError, UnsupportedError

METHOD: Final = "compressed-tensors"
"""`quant_method` in `config.json`, and the name of the format in `Model.save_pretrained`."""
PACKED: Final = "weight_packed"
STORED: Final = (PACKED, "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
"""What may be stored of one weight."""

_FORMATS: Final = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
_HINT: Final = "Use the original float model, or a checkpoint with whole-number weights only, such as W4A16"


def read_schemes(described: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Read how weights are quantized, and refuse what lmopt cannot compute as it was meant.

    Activations that are to be rounded as they come ("dynamic") are left in float, which loses less.

    Args:
        described: The `quantization_config`.
        name: What is loaded, for messages.

    Returns:
        The `weights` of each group.

    Raises:
        UnsupportedError: The scheme is named.
        CorruptArtifactError: A field is malformed.
    """
    status, form = described.get("quantization_status", "compressed"), described.get("format")
    if form not in _FORMATS or status != "compressed":
        raise _unsupported(name, f"format {form!r} with the status {status!r}; lmopt reads {_FORMATS[0]!r} and "
                           f"{_FORMATS[1]!r} with the status 'compressed'")  # fmt: skip
    if described.get("kv_cache_scheme"):
        raise _unsupported(name, "a quantized key-value cache (kv_cache_scheme)")
    if described.get("transform_config"):
        raise _unsupported(name, "rotated activations (transform_config)")
    sparsity = described.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise _unsupported(name, f"sparse weights (sparsity_config {sparsity!r})")
    groups = described.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CorruptArtifactError(f"the quantization_config of {name} has no config_groups")
    return [_scheme(group, f"group {key!r} of {name}") for key, group in groups.items()]


def _scheme(group: Any, where: str) -> Mapping[str, Any]:
    if isinstance(group, dict) and group.get("weights") is None and group.get("input_activations"):
        raise _unsupported(where, "quantized activations of unquantized weights")
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        raise CorruptArtifactError(f"{where} must say how weights are quantized; it is {group!r:.80}")
    if group.get("format") not in (None, *_FORMATS):
        raise _unsupported(where, f"format {group['format']!r}")
    if weights.get("type", "int") != "int":
        raise _unsupported(
            where, f"{weights.get('num_bits')}-bit weights of type {weights['type']!r} (fp8, nvfp4)"
        )
    if weights.get("strategy") not in (None, "group", "channel", "tensor"):
        raise _unsupported(where, f"the strategy {weights['strategy']!r}")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise _unsupported(where, f"columns in another order than they are stored in (actorder "
                           f"{weights['actorder']!r}); 'weight' and 'static' are read")  # fmt: skip
    if group.get("output_activations"):
        raise _unsupported(where, "quantized outputs (output_activations)")
    inputs = group.get("input_activations")
    if inputs and (not isinstance(inputs, dict) or inputs.get("dynamic") is not True):
        raise _unsupported(where, "activations quantized with stored scales (static input_activations)")
    bits = weights.get("num_bits", 8)
    if type(bits) is not int or not 2 <= bits <= 8:
        raise _unsupported(where, f"{bits!r}-bit weights; lmopt reads 2 to 8 bits")
    return {**weights, "num_bits": bits}


def _unsupported(name: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} is quantized by compressed-tensors with {what}, which lmopt does not run. {_HINT}."
    )


def read_part(
    schemes: list[Mapping[str, Any]], stored: Mapping[str, Tensor], rows: int, columns: int, where: str
) -> QuantizedArray:
    """Read one weight. Its form follows from its tensors, and must be one that the configuration knows.

    Args:
        schemes: From `read_schemes`.
        stored: Its tensors, by the names of `STORED`.
        rows: Outputs.
        columns: Inputs.
        where: Name for messages.

    Raises:
        CorruptArtifactError: A tensor is missing, misshapen or fits no scheme.
        UnsupportedError: Its groups are no form of the layout, or its columns are re-ordered.
    """
    scale = stored.get("weight_scale")
    if scale is None:
        raise CorruptArtifactError(f"{where} has no weight_scale: the files are incomplete, get a fresh copy")
    groups = scale.shape[1] if scale.ndim == 2 else 1
    if scale.numel() == 1:  # strategy "tensor"
        groups, scale = 1, scale.reshape(1, 1).expand(rows, 1)
    scales = read_scales(scale, (rows, groups), f"weight_scale of {where}")
    zeros = stored.get("weight_zero_point")
    packed = stored.get(PACKED)
    if packed is None:
        bits, stream = 8, _bytes(stored["weight"], (rows, columns), f"weight of {where}")
    else:
        if "weight" in stored:
            raise CorruptArtifactError(f"{where} is stored twice: as weight and as {PACKED}")
        shape = stored.get("weight_shape")
        if shape is not None and shape.tolist() != [rows, columns]:
            raise CorruptArtifactError(
                f"weight_shape of {where} is {shape.tolist()}; its model needs {[rows, columns]}"
            )
        bits = _bits(schemes, packed, zeros is None, columns, where)
        stream = read_words(packed, (rows, words(columns, bits)), f"{PACKED} of {where}")
    group_size = _group_size(schemes, columns, groups, where)
    _check_order(stored.get("weight_g_idx"), columns, group_size, where)
    return from_stream(
        stream, columns, bits, group_size, scales, _zeros(zeros, rows, groups, bits, where), where
    )


def _bits(schemes: list[Mapping[str, Any]], packed: Tensor, symmetric: bool, columns: int, where: str) -> int:
    fitting = [
        one for one in schemes if packed.ndim == 2 and words(columns, one["num_bits"]) == packed.shape[1]
    ]
    if symmetric and fitting:
        fitting = [one for one in fitting if one.get("symmetric", True) is not False]
        if not fitting:
            raise CorruptArtifactError(
                f"{where} has no weight_zero_point, but is not symmetric: get a fresh copy"
            )
    found = {int(one["num_bits"]) for one in fitting}
    if len(found) != 1:
        raise CorruptArtifactError(
            f"{PACKED} of {where}, of shape {tuple(packed.shape)}, is no weight of {columns} columns in one of the "
            f"widths that its configuration names: {', '.join(str(one['num_bits']) for one in schemes)} bits"
        )
    return found.pop()


def _group_size(schemes: list[Mapping[str, Any]], columns: int, groups: int, where: str) -> int:
    if groups == 1:
        return whole_row(columns)
    stated = {one.get("group_size") for one in schemes}
    if not groups or columns % groups or columns // groups not in stated:
        raise CorruptArtifactError(
            f"weight_scale of {where} has {groups} groups for {columns} columns; its configuration knows groups of "
            f"{', '.join(map(str, stated))}"
        )
    return columns // groups


def _zeros(zeros: Tensor | None, rows: int, groups: int, bits: int, where: str) -> Codes | None:
    if zeros is None:
        return None
    what = f"weight_zero_point of {where}"
    if str(zeros.dtype) == "torch.int8":  # not packed
        if zeros.numel() == 1:
            zeros = zeros.reshape(1, 1).expand(rows, 1)
        signed = _bytes(zeros, (rows, groups), what)
        return signed - np.uint8(128 - (1 << (bits - 1)))
    along_rows = zeros.t() if zeros.ndim == 2 else zeros
    return unpack_stream(read_words(along_rows, (groups, words(rows, bits)), what), rows, bits).T


def _bytes(tensor: Tensor, shape: tuple[int, int], what: str) -> Codes:
    """Signed bytes as codes from 0 to 255."""
    if str(tensor.dtype) != "torch.int8" or tuple(tensor.shape) != shape:
        raise CorruptArtifactError(
            f"{what} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}; expected int8 of "
            f"shape {shape}"
        )
    codes: Codes = np.ascontiguousarray(tensor.numpy()).view(np.uint8) ^ np.uint8(128)
    return codes


def _check_order(order: Tensor | None, columns: int, group_size: int, where: str) -> None:
    if order is not None and not torch.equal(order.long(), torch.arange(columns) // group_size):
        raise UnsupportedError(
            f"the columns of {where} are grouped in another order than they are stored in (weight_g_idx, actorder "
            "'group'), which lmopt's layout cannot hold. Quantize it again with actorder='static'."
        )
