"""Write a model's weights, read them back into an own class, and tell two models apart."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn

from lmopt.artifact import Artifact, publish
from lmopt.backends.torch.casting import apply_casts
from lmopt.backends.torch.compressed_tensors import METHOD as COMPRESSED_TENSORS
from lmopt.backends.torch.compressed_tensors_writing import Written
from lmopt.backends.torch.compressed_tensors_writing import write as write_compressed_tensors
from lmopt.backends.torch.description import Loaded
from lmopt.backends.torch.language_model import is_transformers, stated_casts
from lmopt.backends.torch.loading import quiet
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.quantized_files import load_state, save_state
from lmopt.backends.torch.quantizing import METHOD, describe, stored_bytes
from lmopt.backends.torch.resizing import apply_structure, stated_widths, structure_of
from lmopt.backends.torch.trust import CONFIG, WEIGHTS
from lmopt.errors import ArtifactNotFoundError, CorruptArtifactError, UnsupportedOptionError
from lmopt.speech import write_preprocessor

FORMAT: Final = "safetensors"
QUANTIZATION_FORMATS: Final = (METHOD, COMPRESSED_TENSORS)
"""Formats of quantized weights that can be written."""

# Where a configuration came from and who wrote it; the module's class and types are hashed anyway.
_NOT_IDENTITY: Final = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})


def write_weights(module: nn.Module, staging: Path, written: Written | None = None) -> dict[str, Any]:
    """Write weights, and for transformers models their configuration, into a folder.

    Args:
        module: The model.
        staging: Existing folder.
        written: The model in the format of compressed-tensors, to be written in lmopt's place.

    Returns:
        What the manifest says of the format `"safetensors"`.
    """
    dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in module.state_dict().values()})
    entry: dict[str, Any] = {"class": type(module).__name__, "dtypes": dtypes}
    quantization = describe(module)
    entry["library"] = "transformers" if is_transformers(module) else "custom"
    if structure := structure_of(module):
        entry["structure"] = structure
    casts = stated_casts(module)
    if casts and not is_transformers(module):
        entry["casts"] = casts
    if written is not None:
        save_file(written.tensors, staging / WEIGHTS, metadata={"format": "pt"})
        _write_config(module, staging, written.quantization, dtype=written.dtype)
        entry["quantization_format"] = COMPRESSED_TENSORS
        entry["dequantized"] = list(written.dequantized)
    elif quantization or stated_widths(module) or (casts and is_transformers(module)):
        # By their own names: `load_state` reads them back into the parts as they are cut.
        save_state(module, staging / WEIGHTS)
        if is_transformers(module):
            _write_config(module, staging, quantization, dtype=casts.get("dtype"))
        else:
            entry["quantization"] = quantization
    elif is_transformers(module):
        with quiet():
            # Any: nn.Module's attributes are tensors or modules to a type checker.
            model: Any = module
            model.save_pretrained(staging)
    else:
        save_model(module, str(staging / WEIGHTS))
    return entry


def _write_config(
    module: Any, staging: Path, quantization: Mapping[str, Any], dtype: str | None = None
) -> None:
    """Write transformers' files of a model, with what is said of its quantized parts."""
    with quiet():
        module.config.save_pretrained(staging)
        if module.can_generate():
            module.generation_config.save_pretrained(staging)
    path = staging / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers itself writes both fields only when it saves weights too.
    config["architectures"] = [type(module).__name__]
    if quantization:
        config["quantization_config"] = quantization
    if dtype is not None:
        config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(
    loaded: Loaded,
    target: Path,
    *,
    source: str,
    overwrite: bool,
    recipe: Sequence[Mapping[str, Any]] = (),
    report: Mapping[str, Any] | None = None,
    quantization_format: str = METHOD,
    dequantize: bool = False,
) -> Artifact:
    """Publish a model as an lmopt artefact in Hugging Face layout.

    Args:
        loaded: The model.
        target: Folder to create.
        source: Name of what it was made of.
        overwrite: Replace an artefact that is there.
        recipe: Steps by which it was compressed, for the manifest.
        report: What these cost, for the manifest.
        quantization_format: One of `QUANTIZATION_FORMATS`.
        dequantize: Write parts in float that this format cannot hold.

    Raises:
        UnsupportedOptionError: There is no such format, or it cannot hold the model.
        ArtifactExistsError: The target holds something that may not be replaced.
        DiskFullError: The disk cannot hold it.
    """
    written = in_format(loaded.module, quantization_format, dequantize=dequantize)
    needed = stored_bytes(loaded.module)
    if written is not None:
        needed = sum(one.numel() * one.element_size() for one in written.tensors.values())
    with publish(target, overwrite=overwrite, needed=needed) as draft:
        draft.manifest["formats"] = {FORMAT: write_weights(loaded.module, draft.path, written)}
        if loaded.tokenizer is not None:
            loaded.tokenizer.save(draft.path)
        write_preprocessor(draft.path, loaded.config, loaded.facts.source)
        draft.manifest["model"] = asdict(loaded.facts)
        if recipe:
            draft.manifest["recipe"] = {"steps": list(recipe)}
        if report is not None:
            draft.manifest["measurements"] = {**draft.manifest.get("measurements", {}), "compression": report}
        draft.manifest["source"] = {"name": source, "fingerprint": fingerprint(loaded.module, loaded.config)}
        draft.manifest["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Artifact.open(target, verify=False)


def in_format(module: nn.Module, quantization_format: str, *, dequantize: bool) -> Written | None:
    """Bring quantized weights into a format of others, `None` for lmopt's own.

    Args:
        module: The model.
        quantization_format: One of `QUANTIZATION_FORMATS`.
        dequantize: Write parts in float that the format cannot hold.

    Raises:
        UnsupportedOptionError: There is no such format, or it cannot hold the model.
    """
    if quantization_format not in QUANTIZATION_FORMATS or (dequantize and quantization_format == METHOD):
        raise UnsupportedOptionError(
            f"quantization_format is {quantization_format!r}; expected one of {', '.join(QUANTIZATION_FORMATS)}; "
            f"dequantize goes with {COMPRESSED_TENSORS!r}"
        )
    return None if quantization_format == METHOD else write_compressed_tensors(module, dequantize=dequantize)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Read the weights of an artefact into a module of the same class.

    Raises:
        ArtifactNotFoundError: The artefact holds no safetensors weights.
        CorruptArtifactError: They do not fit the module; the names are listed. Names are compared
            first, so the module is then unchanged unless a shape differs. Blocks and channels that were cut
            out of the saved model are cut out of this one first.
    """
    artifact = Artifact.open(folder)
    if FORMAT not in artifact.formats:
        raise ArtifactNotFoundError(
            f"{folder} holds {', '.join(artifact.formats) or 'no format'}, no {FORMAT} weights. "
            f"Save them: model.save_pretrained(...)"
        )
    entry = artifact.manifest["formats"][FORMAT]
    if "structure" in entry:
        apply_structure(module, entry["structure"], str(folder))
    if "casts" in entry and stated_casts(module) != entry["casts"]:
        apply_casts(module, entry["casts"], str(folder))
    quantization = entry.get("quantization")
    if quantization:
        load_state(module, quantization, [artifact.file(WEIGHTS)], str(folder))
        return
    try:
        load_model(module, str(artifact.file(WEIGHTS)))
    except (RuntimeError, SafetensorError) as error:
        raise CorruptArtifactError(
            f"{folder / WEIGHTS} does not fit this {type(module).__name__}: {error}. Build the module with "
            "the "
            f"sizes that it was saved with."
        ) from error


def fingerprint(module: nn.Module, config: Mapping[str, Any]) -> str:
    """Hash configuration and weights: equal for equal models, in every process.

    Computed anew at each call (about a second a gigabyte and core), since a live module can be
    trained further.

    Returns:
        64 hexadecimal digits.
    """
    state = sorted((dict(module.named_buffers()) | module.state_dict()).items())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda item: _tensor_hash(item[1]), state))
    whole = hashlib.sha256()
    stated = {key: value for key, value in config.items() if key not in _NOT_IDENTITY}
    whole.update(json.dumps(stated, sort_keys=True, default=str).encode())
    whole.update(type(module).__qualname__.encode())
    if not is_transformers(module):
        for path, part in module.named_modules():
            whole.update(f"\n{path} {_settings(part)}".encode() + _code(part))
    for path, part in quantized_parts(module).items():
        # Bytes alone do not tell 4-bit codes in groups of 32 from 8-bit codes in groups of 16.
        whole.update(f"\n{path} {part.grid} {getattr(part, 'activations', None)}".encode())
    whole.update(json.dumps(stated_casts(module), sort_keys=True).encode() if stated_casts(module) else b"")
    for (name, tensor), digest in zip(state, digests, strict=True):
        whole.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + digest)
    return whole.hexdigest()


def _settings(part: nn.Module) -> str:
    """Spell the plain attributes of a part of an own module: two of a class may differ by these alone."""
    plain = (bool, int, float, str, type(None))
    return repr({k: v for k, v in sorted(vars(part).items()) if k != "training" and isinstance(v, plain)})


def _code(part: nn.Module) -> bytes:
    """Give the code of a part of an own module, as text or, in a notebook or shell, as byte code."""
    kind = type(part)
    try:
        return inspect.getsource(kind).encode()
    except (OSError, TypeError):
        return repr(getattr(getattr(kind.forward, "__code__", None), "co_code", kind.__qualname__)).encode()


def _tensor_hash(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).digest()
