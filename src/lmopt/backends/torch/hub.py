"""Bring a model from the Hugging Face hub; torch and transformers, which take seconds, are not imported."""

import os

# Latched when huggingface_hub is first imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from pathlib import Path
from typing import Final

from lmopt.errors import ArtifactNotFoundError

_PATTERNS: Final = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.tiktoken")
_TRUSTED: Final = ("*.bin", "*.py")


def fetch(name: str, *, revision: str | None, local_files_only: bool, trust: bool) -> Path:
    """Bring a model of the Hugging Face hub into its cache and return the folder.

    Raises:
        ArtifactNotFoundError: There is no such model, or the hub cannot be reached.
    """
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=[*_PATTERNS, *_TRUSTED] if trust else list(_PATTERNS),
            )
        )
    except (OSError, ValueError) as error:
        # The chain below it is twenty frames of an HTTP client, and its last words are quoted.
        raise ArtifactNotFoundError(
            f"{name!r} is no file or folder here (looked in {Path.cwd()}), and it could not be had from the "
            f"Hugging Face hub: {type(error).__name__}: {error}"
        ) from None
