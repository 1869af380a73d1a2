"""Write quantized parts in the format of the compressed-tensors library, without changing a value.

See `lmopt.backends.torch.compressed_tensors` for what is stored. What is written here was tried with
transformers 5.23 and compressed-tensors 0.20, whose limits `_obstacle` and `_describe` name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lmopt.backends.torch.bitstreams import pack_stream
from lmopt.backends.torch.compressed_tensors import METHOD, PACKED
from lmopt.backends.torch.language_model import is_transformers
from lmopt.backends.torch.quantized import Quantized, QuantizedEmbedding, quantized_parts, rounded_bits
from lmopt.backends.torch.quantized import dequantize as dense
from lmopt.backends.torch.quantized_files import distinct_state
from lmopt.backends.torch.quantizing import is_conv1d
from lmopt.backends.torch.resizing import stated_widths
from lmopt.compression.layout import Codes, Grid, unpack
from lmopt.errors import UnsupportedOptionError

# Smaller groups than these are no kernel's; a weight with such a remainder is better left in float.
_SMALLEST_GROUP: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A model in this format.

    Attributes:
        tensors: Content of `model.safetensors`.
        quantization: The `quantization_config` of `config.json`.
        dtype: Type of what is not quantized, and of the scales.
        dequantized: Paths of quantized parts that are written in float.
    """

    tensors: dict[str, Tensor]
    quantization: dict[str, Any]
    dtype: str
    dequantized: tuple[str, ...]


def write(module: nn.Module, *, dequantize: bool = False) -> Written:
    """Turn a module with quantized parts into what compressed-tensors stores; the values stay the same.

    Codes are written in 4 or 8 bits, which all versions of the library and vLLM read: narrower ones are
    widened. Groups that do not divide a row become smaller ones with the same scales, down to 16 columns.

    Args:
        module: A transformers model.
        dequantize: Write parts in float that the format cannot hold, instead of refusing.

    Raises:
        UnsupportedOptionError: The format cannot hold the model; the message says which part and why.
    """
    parts = quantized_parts(module)
    if not is_transformers(module) or not parts:
        lacking = "has no quantized weights" if is_transformers(module) else "is a class of your own"
        raise UnsupportedOptionError(
            f"quantization_format={METHOD!r} is for transformers models with quantized weights; this "
            f"{type(module).__name__} {lacking}. Leave it out."
        )
    if stated_widths(module):
        raise UnsupportedOptionError(
            "channels or heads were pruned, so that layers differ in width, which transformers and vLLM cannot build. "
            "Save in lmopt's own format: leave quantization_format out."
        )
    if rounded_bits(module) is not None:
        raise UnsupportedOptionError(
            "activations are rounded to 8 bits in blocks of columns, which readers of compressed-tensors do not "
            "compute (theirs have one scale a token). Save in lmopt's own format (leave quantization_format out), or "
            "quantize with activations=None."
        )
    # Any: transformers' attributes are tensors or modules to a type checker.
    model: Any = module
    bare = _bare_parts(model)
    left = {path: why for path, part in parts.items() if (why := _obstacle(model, part, bare.get(path)))}
    if left and (not dequantize or left.keys() == parts.keys()):
        told = "; ".join(f"{path}: {why}" for path, why in list(left.items())[:3])
        raise UnsupportedOptionError(
            f"compressed-tensors cannot hold {len(left)} of {len(parts)} quantized parts ({told}). Save in lmopt's own "
            "format (leave quantization_format out), leave them in float when quantizing (for embedding and head: "
            "Quantize(embedding=None, head=None)), or write them in float: dequantize=True."
        )
    tensors = {
        key: tensor for key, tensor in distinct_state(module).items() if key.rpartition(".")[0] not in parts
    }
    sizes, with_zeros = _common_form({path: part.grid for path, part in parts.items() if path not in left})
    forms: dict[tuple[int, int, bool], list[str]] = {}
    seen: set[int] = set()
    for path, part in parts.items():
        bias = getattr(part, "bias", None)
        if bias is not None:
            tensors[f"{path}.bias"] = bias.detach().cpu()
        if path not in left:
            form, made = _pack(part, model.dtype, path, sizes[path], with_zeros)
            forms.setdefault(form, []).append(path)
            tensors |= {f"{path}.{name}": tensor for name, tensor in made.items()}
        elif part.codes.data_ptr() not in seen or not _ties(model):
            seen.add(part.codes.data_ptr())
            # Not `part.weight`, which would stay in memory.
            weight = dense(part).t() if path in bare and is_conv1d(bare[path]) else dense(part)
            tensors[f"{path}.weight"] = weight.to(model.dtype).cpu().contiguous()
    linears = [path for path, one in bare.items() if type(one) is nn.Linear]
    dtype = str(model.dtype).removeprefix("torch.")
    return Written(tensors, _describe(forms, linears), dtype, tuple(left))


def _ties(model: Any) -> bool:
    return bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))


def _bare_parts(model: Any) -> dict[str, nn.Module]:
    """Parts of the float model that the format's readers build before they quantize them."""
    with torch.device("meta"):
        bare = type(model)._from_config(model.config)
    return dict(bare.named_modules())


def _obstacle(model: Any, part: Quantized, bare: nn.Module | None) -> str | None:
    """Say why the format, or transformers as its reader, cannot hold a part."""
    grid = part.grid
    if grid.zero == "offset":
        return "its groups have float offsets, as some types of GGUF; the format has whole zero points"
    if isinstance(part, QuantizedEmbedding):
        return "transformers reads no quantized embedding"
    if _ties(model) and part is model.get_output_embeddings():
        return "it is tied to the embedding, and transformers reads no quantized embedding"
    if type(bare) is not nn.Linear:
        return f"to transformers it is a {type(bare).__name__}, and the format has Linears only"
    if tuple(bare.weight.shape) != (grid.rows, grid.columns):
        return (
            f"transformers builds {tuple(bare.weight.shape)} by config.json, not {(grid.rows, grid.columns)}"
        )
    if not _written_group(grid):
        return f"its {grid.columns} columns are no whole number of groups of {grid.group_size}"
    return None


def _written_group(grid: Grid) -> int:
    """Columns of a group that divides a row, -1 for a group a row, 0 for none."""
    if grid.columns % grid.group_size == 0:
        return grid.group_size
    if grid.groups == 1:
        return -1
    size = math.gcd(grid.group_size, grid.columns)
    return size if size >= _SMALLEST_GROUP else 0


def _common_form(grids: Mapping[str, Grid]) -> tuple[dict[str, int], bool]:
    """Choose the size of each part's groups, and whether to write zero points.

    transformers reads zero points only where all parts have one form, so these get one if they can.
    """
    sizes = {path: _written_group(grid) for path, grid in grids.items()}
    with_zeros = any(grid.zero == "integer" for grid in grids.values())
    if with_zeros and len(set(sizes.values())) > 1:
        common = math.gcd(*(grids[path].columns if size == -1 else size for path, size in sizes.items()))
        if common >= _SMALLEST_GROUP:
            sizes = dict.fromkeys(sizes, common)
    return sizes, with_zeros


def _pack(
    part: Quantized, dtype: torch.dtype, path: str, size: int, with_zeros: bool
) -> tuple[tuple[int, int, bool], dict[str, Tensor]]:
    """Pack one weight: its bits, size of groups and symmetry, and its tensors."""
    array = part.array()
    grid = array.grid
    bits = 4 if grid.bits <= 4 else 8
    codes = unpack(array.codes, grid).reshape(grid.rows, -1)[:, : grid.columns]
    scales, zeros = array.scales, array.zero_points
    if zeros is None:
        codes = codes + np.uint8((1 << (bits - 1)) - grid.midpoint)
        zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8) if with_zeros else None
    if size not in (-1, grid.group_size):
        repeats, groups = grid.group_size // size, grid.columns // size
        scales = np.repeat(scales, repeats, axis=1)[:, :groups]
        zeros = None if zeros is None else np.repeat(zeros, repeats, axis=1)[:, :groups]
    scale = torch.tensor(scales)
    if not torch.equal(scale.to(dtype).float(), scale):
        raise UnsupportedOptionError(
            f"the scales of {path} are float32, but the model is {str(dtype).removeprefix('torch.')}, in which "
            "transformers and vLLM would round them. Turn the model into float32 first, which changes no weight: "
            "model.module.float(), or Model.from_pretrained(..., dtype='float32')"
        )
    made = {
        PACKED: _words(pack_stream(codes, bits)),
        "weight_scale": scale.to(dtype),
        "weight_shape": torch.tensor([grid.rows, grid.columns]),
    }
    if zeros is not None:
        made["weight_zero_point"] = _words(pack_stream(np.ascontiguousarray(zeros.T), bits)).t().contiguous()
    return (bits, size, zeros is None), made


def _words(stream: Codes) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(stream).view("<i4").astype(np.int32, copy=False))


def _describe(forms: Mapping[tuple[int, int, bool], list[str]], linears: list[str]) -> dict[str, Any]:
    """Say what was packed: the `quantization_config` of `config.json`."""
    asymmetric = any(not symmetric for _, _, symmetric in forms)
    if asymmetric and len(forms) > 1:
        told = ", ".join(
            f"{bits} bits in groups of {'a row' if size == -1 else size} ({paths[0]})"
            for (bits, size, _), paths in forms.items()
        )
        raise UnsupportedOptionError(
            f"the model has zero points and parts of several forms: {told}. transformers reads zero points of this "
            "format only where all parts have one form. Quantize symmetrically, or all with the same bits, or save in "
            "lmopt's own format (leave quantization_format out)."
        )
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(forms) == 1 else paths,
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
                "strategy": "channel" if size == -1 else "group", "group_size": None if size == -1 else size,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for number, ((bits, size, symmetric), paths) in enumerate(forms.items())
    }  # fmt: skip
    packed = {path for paths in forms.values() for path in paths}
    described = {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [path for path in linears if path not in packed],
        "kv_cache_scheme": None,
    }
    # Otherwise transformers (5.23, with compressed-tensors 0.20) expects zero points that are not packed.
    return described | {"dequantize": True} if asymmetric else described
