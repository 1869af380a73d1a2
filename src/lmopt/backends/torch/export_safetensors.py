"""Write weights in the Hugging Face layout, and read every one of them back."""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open

from lmopt.backends.torch.saving import write_weights
from lmopt.contracts import ExportRequest
from lmopt.errors import ParityError, UnsupportedOptionError


def export_safetensors(request: ExportRequest) -> Mapping[str, Any]:
    """Write `model.safetensors` (and, for transformers models, `config.json`) into the staging folder.

    Args:
        request: See `lmopt.contracts.ExportRequest`; there are no options.

    Raises:
        UnsupportedOptionError: An option was given.
        ParityError: A weight that was read back differs from the model's.
    """
    if request.options:
        raise UnsupportedOptionError(f"exporter 'safetensors' has no option {sorted(request.options)[0]!r}")
    described = write_weights(request.module, request.folder)
    # Tied weights are stored under one of their names.
    original = request.module.state_dict()
    stored = 0
    for path in sorted(request.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                stored += 1
                if name not in original or not torch.equal(file.get_tensor(name), original[name].cpu()):
                    raise ParityError(f"{path.name} holds {name} with other values than the model has")
    return {**described, "tensors": stored}
