"""Quantized parts on disk: `model.safetensors` with their arrays, and what `config.json` says of them.

`q_proj.weight` becomes `q_proj.codes`, `q_proj.scales` and, where its form has one, `q_proj.zero_points` or
`q_proj.offsets`; scales and offsets take 16 bits where half precision holds all of them exactly. The field
`quantization_config` of `config.json` (and the manifest's entry) names each such part with its rows, columns, bits,
group size and form of zero. See docs/adr/0010-quantized-layout.md.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lmopt.backends.torch.quantized import STORED, Quantized
from lmopt.backends.torch.quantizing import VERSION, halves, set_part, substitute
from lmopt.compression.layout import Grid, QuantizedArray
from lmopt.errors import CorruptArtifactError, UnsupportedError, UnsupportedOptionError

_SIZES: Final = ("rows", "columns", "bits", "group_size")


def save_state(module: nn.Module, path: Path) -> None:
    """Write a module's weights, shared ones under their first name only."""
    state = distinct_state(module)
    for key, tensor in state.items():
        if key.rpartition(".")[2] in ("scales", "offsets") and _is_stored(module, key) and halves(tensor):
            state[key] = tensor.half()
    save_file(state, str(path), metadata={"format": "pt"})


def distinct_state(module: nn.Module) -> dict[str, Tensor]:
    """List a module's weights on the CPU, shared ones under their first name only."""
    seen: set[tuple[Any, ...]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor.detach().cpu().contiguous()
    return kept


def load_state(module: nn.Module, described: Mapping[str, Any], paths: Iterable[Path], name: str) -> None:
    """Put quantized parts into a module and read all weights.

    Args:
        module: A freshly built module of the class that was saved, in float.
        described: Its `quantization_config`.
        paths: Its safetensors files.
        name: What is loaded, for messages.

    Raises:
        CorruptArtifactError: A description, an array or a weight is missing, malformed or left over.
        UnsupportedError: The description is of a newer version.
    """
    tensors = read_tensors(paths, name)
    parts = _described(described, name)
    made: dict[str, Quantized] = {}
    # What others are tied to comes first.
    for path, entry in sorted(parts.items(), key=lambda item: "tied_to" in item[1]):
        where = f"{path} of {name}"
        try:
            old = module.get_submodule(path)
        except AttributeError:
            raise CorruptArtifactError(
                f"{name} describes {path}, which {type(module).__name__} lacks"
            ) from None
        tied_to = entry.get("tied_to")
        if tied_to is None:
            array = _array(path, entry, tensors, where)
        elif tied_to in made:
            array = made[tied_to].array()
        else:
            raise CorruptArtifactError(f"{where} is tied to {tied_to!r}, which is described nowhere")
        if (activations := entry.get("activations")) not in (None, 8):
            raise CorruptArtifactError(
                f"{where} rounds activations to {activations!r} bits; expected 8 or none"
            )
        try:
            new = substitute(old, array, activations)
        except UnsupportedOptionError as error:
            raise CorruptArtifactError(f"{where} does not fit {type(module).__name__}: {error}") from error
        made[path] = new if tied_to is None else new.share(made[tied_to])
        set_part(module, path, new)
    load_rest(module, tensors, name)


def read_tensors(paths: Iterable[Path], name: str) -> dict[str, Tensor]:
    """Read all tensors of safetensors files.

    Raises:
        CorruptArtifactError: A file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for path in paths:
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dictionary)
    except (OSError, SafetensorError) as error:
        raise CorruptArtifactError(f"the weights of {name} cannot be read: {error}") from error
    return tensors


def _described(described: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    version, parts = described.get("version"), described.get("parts")
    if version != VERSION:
        raise UnsupportedError(
            f"{name} is quantized in version {version!r} of lmopt's layout; this lmopt reads {VERSION}. Update it: "
            "pip install --upgrade lmopt"
        )
    if not isinstance(parts, dict) or not all(isinstance(one, dict) for one in parts.values()):
        raise CorruptArtifactError(f"the quantization_config of {name} must map parts to their forms")
    return parts


def _array(path: str, entry: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> QuantizedArray:
    try:
        sizes = {field: entry[field] for field in _SIZES}
        if any(type(size) is not int for size in sizes.values()):
            raise UnsupportedOptionError(f"its sizes are {sizes}; they must be whole numbers")
        grid = Grid(**sizes, zero=entry["zero"])
    except KeyError as error:
        raise CorruptArtifactError(f"the description of {where} lacks {error}") from None
    except UnsupportedOptionError as error:
        raise CorruptArtifactError(f"the description of {where} is impossible: {error}") from error
    found: dict[str, Any] = {}
    for stored in grid.shapes():
        tensor = tensors.pop(f"{path}.{stored}", None)
        if tensor is None:
            raise CorruptArtifactError(f"{where} has no {stored}: the files are incomplete, get a fresh copy")
        if tensor.dtype not in (torch.uint8, torch.float16, torch.float32):
            raise CorruptArtifactError(
                f"{stored} of {where} is {tensor.dtype}; expected uint8, float16 or float32"
            )
        found[stored] = np.asarray((tensor.float() if tensor.dtype == torch.float16 else tensor).numpy())
    try:
        return QuantizedArray(grid, **found)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"{where} is damaged: {error}") from error


def load_rest(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load what is not quantized into a module whose quantized parts are in place.

    Raises:
        CorruptArtifactError: A weight is missing, left over or misshapen.
    """
    state = module.state_dict()
    expected = {key for key in state if key.rpartition(".")[2] not in STORED or not _is_stored(module, key)}
    left_over = sorted(tensors.keys() - expected)
    given = {state[key].data_ptr() for key in expected & tensors.keys()}
    missing = sorted(key for key in expected - tensors.keys() if state[key].data_ptr() not in given)
    misshapen = sorted(
        key for key in expected & tensors.keys() if tuple(state[key].shape) != tuple(tensors[key].shape)
    )
    tied: dict[tuple[Any, ...], str] = {}
    differing = [
        f"{first} and {key}"
        for key in state
        if key in tensors and key in expected and state[key].numel()
        if (first := tied.setdefault((state[key].data_ptr(), state[key].shape), key)) != key
        and not torch.equal(tensors[first], tensors[key])
    ]
    faults = {
        "missing": missing, "not part of the model": left_over, "misshapen": misshapen,
        "tied, but different": differing,
    }  # fmt: skip
    if told := [f"{kind}: {', '.join(keys[:5])}" for kind, keys in faults.items() if keys]:
        raise CorruptArtifactError(
            f"the weights of {name} do not fit its config.json; {'; '.join(told)}. Get a complete copy of the model."
        )
    module.load_state_dict({key: tensors[key] for key in expected & tensors.keys()}, strict=False)


def _is_stored(module: nn.Module, key: str) -> bool:
    return isinstance(module.get_submodule(key.rpartition(".")[0]), Quantized)
