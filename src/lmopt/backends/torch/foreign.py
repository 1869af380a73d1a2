"""Read checkpoints that others have quantized: compressed-tensors, GPTQ and AWQ; weights stay as they are.

None of the libraries is needed. Which weights are quantized is told by their tensors, so that no pattern of a
stranger's configuration has to be run.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

from lmopt.backends.torch import compressed_tensors
from lmopt.backends.torch.gptq_awq_files import Reader, read_awq, read_gptq
from lmopt.backends.torch.quantized_files import load_rest, read_tensors
from lmopt.backends.torch.quantizing import matrix_of, set_part, substitute
from lmopt.errors import CorruptArtifactError, UnsupportedError, UnsupportedOptionError

_STORED: Final = ("qweight", "qzeros", "scales", "g_idx")


def load_foreign(module: nn.Module, described: Mapping[str, Any], paths: Iterable[Path], name: str) -> None:
    """Put quantized parts into a module and read all weights.

    Args:
        module: A freshly built transformers model, in float.
        described: Its `quantization_config`, whose `quant_method` is one of `METHODS`.
        paths: Its safetensors files.
        name: What is loaded, for messages.

    Raises:
        CorruptArtifactError: A field or a tensor is missing, malformed or left over.
        UnsupportedError: The scheme, which is named, is none that lmopt can hold.
    """
    tensors = read_tensors(paths, name)
    read, stored = _READERS[described["quant_method"]]
    read_part = read(described, name)
    found = sorted({key.rpartition(".")[0] for key, tensor in tensors.items() if _is_codes(key, tensor)})
    if not found:
        raise CorruptArtifactError(
            f"the config.json of {name} says that weights are quantized ({described['quant_method']}), but no tensor is"
        )
    for path in found:
        where = f"{path} of {name}"
        old = _part(module, path, name)
        rows, columns = matrix_of(old).shape
        given = {one: tensors.pop(f"{path}.{one}") for one in stored if f"{path}.{one}" in tensors}
        try:
            new = substitute(old, read_part(given, rows, columns, where))
        except UnsupportedOptionError as error:
            raise UnsupportedError(
                f"{where} is quantized, but no part that lmopt holds so: {error}"
            ) from error
        set_part(module, path, new)
        bias = tensors.get(f"{path}.bias")
        # Some writers give every linear a bias.
        if bias is not None and getattr(old, "bias", None) is None and not bias.any():
            del tensors[f"{path}.bias"]
    expected = module.state_dict().keys()
    outdated = _outdated(module)
    load_rest(
        module, {key: one for key, one in tensors.items() if key in expected or not outdated(key)}, name
    )


def _is_codes(key: str, tensor: Tensor) -> bool:
    last = key.rpartition(".")[2]
    return last in ("qweight", compressed_tensors.PACKED) or (last == "weight" and tensor.dtype == torch.int8)


def _part(module: nn.Module, path: str, name: str) -> nn.Module:
    try:
        part = module.get_submodule(path)
    except AttributeError:
        part = nn.Identity()
    if not isinstance(getattr(part, "weight", None), Tensor) or matrix_of(part).dim() != 2:
        raise UnsupportedError(
            f"{name} holds {path} quantized, which is no linear or embedding of the {type(module).__name__} of "
            f"transformers {transformers.__version__} (it fuses experts into one weight, or names its parts "
            "otherwise). Use the original float model."
        )
    return part


def _outdated(module: Any) -> Callable[[str], bool]:
    """Tell weights that transformers' class says old files hold needlessly, by the rules of transformers."""
    patterns = {r"rotary_emb\.inv_freq$", *(module._keys_to_ignore_on_load_unexpected or ())}
    return lambda key: any(re.search(one, key) for one in patterns)


def _read_compressed_tensors(described: Mapping[str, Any], name: str) -> Reader:
    schemes = compressed_tensors.read_schemes(described, name)
    return lambda given, rows, columns, where: compressed_tensors.read_part(
        schemes, given, rows, columns, where
    )


_READERS: Final[Mapping[str, tuple[Callable[[Mapping[str, Any], str], Reader], tuple[str, ...]]]] = {
    compressed_tensors.METHOD: (_read_compressed_tensors, compressed_tensors.STORED),
    "gptq": (read_gptq, _STORED),
    "awq": (read_awq, _STORED),
}
METHODS: Final = tuple(_READERS)
"""Values of `quant_method` in `config.json` that are read here."""
