"""Write weights in the Hugging Face layout, and read every one of them back."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lmopt.backends.torch.language_model import is_transformers
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.quantizing import METHOD
from lmopt.backends.torch.resizing import stated_widths
from lmopt.backends.torch.saving import in_format, write_weights
from lmopt.contracts import ExportRequest
from lmopt.errors import ParityError, UnsupportedOptionError


def export_safetensors(request: ExportRequest) -> Mapping[str, Any]:
    """Write `model.safetensors` (and, for transformers models, `config.json`) into the staging folder.

    Args:
        request: See `lmopt.contracts.ExportRequest`. Options, for models with quantized weights:
            `quantization_format="compressed-tensors"` writes what transformers and vLLM read, `dequantize` (default
            `False`) writes parts in float that it cannot hold.

    Raises:
        UnsupportedOptionError: There is no such option or format, or it cannot hold the model.
        ParityError: A weight that was read back differs from the model's.
    """
    options = dict(request.options)
    quantization_format, dequantize = (
        options.pop("quantization_format", METHOD),
        options.pop("dequantize", False),
    )
    if options:
        raise UnsupportedOptionError(
            f"exporter 'safetensors' has no option {sorted(options)[0]!r}; it has: quantization_format, dequantize"
        )
    written = in_format(request.module, quantization_format, dequantize=dequantize)
    described = write_weights(request.module, request.folder, written)
    original = _as_written(request.module) if written is None else dict(written.tensors)
    stored: set[str] = set()
    for path in sorted(request.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                stored.add(name)
                if name not in original or not torch.equal(file.get_tensor(name), original[name].cpu()):
                    raise ParityError(f"{path.name} holds {name} with other values than the model has")
    # Tied weights are stored under one of their names.
    kept = {original[name].data_ptr() for name in stored}
    lost = [name for name, one in original.items() if one.numel() and one.data_ptr() not in kept]
    if lost:
        raise ParityError(f"the files lack {lost[0]}, which the model has")
    return {**described, "tensors": len(stored)}


def _as_written(module: nn.Module) -> dict[str, Tensor]:
    """Give the weights under the names and in the shapes in which they are written.

    transformers writes some architectures (experts, above all) as their authors published them.
    """
    state: dict[str, Tensor] = module.state_dict()
    if not is_transformers(module) or quantized_parts(module) or stated_widths(module):
        return state
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5
        return state
    reverted: dict[str, Tensor] = revert_weight_conversion(module, state)
    return reverted
