"""Decide, before transformers sees a model folder, that reading it runs nothing and stays inside."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from lmopt.errors import ArtifactNotFoundError, CorruptArtifactError, UnsafeArtifactError
from lmopt.safefiles import check_safetensors, check_shard_index, contained, hub_blobs, read_json

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

_CONFIGS: Final = (CONFIG, "generation_config.json", "tokenizer_config.json")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_FOLDERS: Final = ("", "additional_chat_templates")
# Fields by which a config makes transformers fetch or run code; each was a hole once
# (CVE-2026-4372, CVE-2026-5241). `None` as the harmless value means: never harmless.
_RUNS_CODE: Final = ("auto_map", "_attn_implementation_internal", "trust_remote_code", "custom_generate")
_NAMES_KERNELS: Final = ("_attn_implementation", "attn_implementation", "_experts_implementation")


def check_folder(folder: Path, *, trust: bool) -> dict[str, Any]:
    """Check every file of a Hugging Face folder that transformers would read.

    Args:
        folder: The folder; in a Hugging Face cache its files may be links into `blobs`.
        trust: Whether the caller allows code and pickles of the folder to run. A field of the
            folder never counts as a grant.

    Returns:
        Content of `config.json`.

    Raises:
        UnsafeArtifactError: It needs a grant of trust, or a name or link leaves the folder.
        ArtifactNotFoundError: It has no `config.json` or no weights.
        CorruptArtifactError: A header or a JSON file is malformed or truncated.
    """
    blobs = hub_blobs(folder)
    names = list(_files(folder))
    for name in names:
        contained(folder, name, allow_symlinks_into=blobs)
    if CONFIG not in names:
        raise ArtifactNotFoundError(
            f"{folder} has no {CONFIG}, so it is no Hugging Face model folder. It has: {_listed(names)}."
        )
    if "adapter_config.json" in names:
        raise UnsafeArtifactError(
            f"{folder / 'adapter_config.json'} makes this an adapter, which would load another model by "
            "name. Merge "
            "it first: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        )
    configs = {name: read_json(folder / name) for name in _CONFIGS if name in names}
    for name, content in configs.items():
        if not isinstance(content, dict):
            raise CorruptArtifactError(f"{folder / name} must hold a JSON object.")
        if not trust:
            _refuse_code(content, folder / name)
    for file in configs.get("tokenizer_config.json", {}).get("fast_tokenizer_files", ()):
        contained(folder, str(file), allow_symlinks_into=blobs)
    config: dict[str, Any] = configs[CONFIG]
    _check_weights(folder, names, config, trust)
    return config


def _files(folder: Path) -> Iterator[str]:
    """Names of the files and links of a model folder, and of its chat templates."""
    for parent in _FOLDERS:
        if not (folder / parent).is_dir():
            continue
        with os.scandir(folder / parent) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if not entry.is_dir(follow_symlinks=False):
                    yield f"{parent}/{entry.name}".lstrip("/")


def _refuse_code(value: Any, path: Path) -> None:
    """Look for fields that run code, at any depth."""
    if isinstance(value, list):
        for one in value:
            _refuse_code(one, path)
    elif isinstance(value, dict):
        for key, one in value.items():
            kernel = key in _NAMES_KERNELS and isinstance(one, str) and "/" in one
            if kernel or (key in _RUNS_CODE and one):
                raise UnsafeArtifactError(
                    f"{path} has the field {key!r}, by which transformers would run code that comes with "
                    "the model. "
                    "If you have read that code and trust it, pass trust=True (--trust); if transformers "
                    "has the "
                    f"architecture itself, remove the field."
                )
            _refuse_code(one, path)


def _check_weights(folder: Path, names: list[str], config: dict[str, Any], trust: bool) -> None:
    stated = config.get("transformers_weights")
    if stated is not None:
        path = contained(folder, str(stated), allow_symlinks_into=hub_blobs(folder))
        index = path.name.endswith(".index.json")
        _ = (
            check_shard_index(path, allow_symlinks_into=hub_blobs(folder))
            if index
            else check_safetensors(path)
        )
    elif WEIGHTS in names:
        check_safetensors(folder / WEIGHTS)
    elif INDEX in names:
        check_shard_index(folder / INDEX, allow_symlinks_into=hub_blobs(folder))
    else:
        pickles = [name for name in names if name.endswith(_PICKLES)]
        if not pickles:
            raise ArtifactNotFoundError(f"{folder} has no weights ({WEIGHTS}). It has: {_listed(names)}.")
        if not trust:
            raise UnsafeArtifactError(
                f"{folder / pickles[0]} is a pickle, which can run any code when it is read. If you trust "
                "its "
                f"origin, pass trust=True (--trust), and save the result as safetensors once and for all."
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "nothing"
    return shown if len(names) <= 8 else f"{shown}, ..."
