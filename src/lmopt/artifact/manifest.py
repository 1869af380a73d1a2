"""The manifest `lmopt.json`: what it holds, its one spelling, and the seal over it.

The file has exactly one valid spelling (sorted keys, two blanks of indentation, ASCII) and carries
the SHA-256 of its own content without that field, so any changed bit in it is noticed. The seal
finds accidents and careless edits. It is no signature: whoever can write the folder can seal anew.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from lmopt.errors import ArtifactError, CorruptArtifactError
from lmopt.safefiles import open_regular, parse_json

MANIFEST: Final = "lmopt.json"
SCHEMA: Final = 1
"""Version of the manifest's layout; a reader refuses one that it does not know."""
MAX_MANIFEST: Final = 16 * 1024 * 1024
"""Largest manifest read, in bytes."""
CONTENT: Final = ("formats", "measurements", "model", "parity", "recipe", "source", "versions")
"""Fields that the writer of an artefact fills; each is an object and may be empty."""
OWN: Final = ("created_by", "files", "schema", "sha256")
"""Fields that `publish` fills."""

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def plain(value: Any, where: str) -> Any:
    """Turn a value into plain JSON data with one spelling, or say what cannot be turned.

    Args:
        value: Nested mappings, sequences, dataclasses, NumPy scalars, texts and finite numbers.
        where: Name of the value for the error message.

    Raises:
        ArtifactError: A key is not text, a number is not finite, or a type has no place in JSON
            (a path, for one: it would tie the artefact to one machine).
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ArtifactError(f"{where} has the key {wrong[0]!r}; keys must be text.")
        return {str(key): plain(value[key], f"{where}.{key}") for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [plain(one, f"{where}[{index}]") for index, one in enumerate(value)]
    raise ArtifactError(
        f"{where} is {value!r} ({type(value).__name__}); a manifest or cache key holds mappings, lists, "
        f"texts, finite numbers, truth values and null only. Convert it first."
    )


def canonical(value: Any, where: str) -> bytes:
    """Spell a value as compact JSON, equal for equal values in every process."""
    return json.dumps(plain(value, where), sort_keys=True, separators=(",", ":")).encode("ascii")


def render(manifest: Mapping[str, Any]) -> bytes:
    """Seal a manifest and spell it as the bytes of `lmopt.json`.

    Args:
        manifest: All fields but `sha256`, which is computed.
    """
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    body["sha256"] = hashlib.sha256(canonical(body, MANIFEST)).hexdigest()
    return json.dumps(body, sort_keys=True, indent=2, allow_nan=False).encode("ascii") + b"\n"


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check `lmopt.json`.

    Raises:
        ArtifactNotFoundError: There is no such file.
        CorruptArtifactError: It is malformed, of an unknown schema, or not as it was written.
    """
    with open_regular(path) as (file, size):
        if size > MAX_MANIFEST:
            raise CorruptArtifactError(f"{path}: {size} bytes; a manifest has at most {MAX_MANIFEST}.")
        raw = file.read()
    found = parse_json(raw, str(path))
    if not isinstance(found, dict):
        raise CorruptArtifactError(f"{path}: a manifest is a JSON object, this is a {type(found).__name__}.")
    if found.get("schema") != SCHEMA:
        raise CorruptArtifactError(
            f"{path}: schema {found.get('schema')!r} is unknown; this lmopt reads schema {SCHEMA}. "
            f"If a newer lmopt wrote it, update: python -m pip install --upgrade lmopt"
        )
    try:
        whole = render(found) == raw
    except (ArtifactError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise CorruptArtifactError(
            f"{path}: it is not as lmopt wrote it (damaged or edited). Export the model again."
        )
    _check_fields(found, path)
    return found


def _check_fields(manifest: Mapping[str, Any], path: Path) -> None:
    """Check what a correct seal does not prove: that the writer kept to the layout."""
    files = manifest.get("files")
    for field in CONTENT:
        if not isinstance(manifest.get(field), dict):
            raise CorruptArtifactError(f"{path}: the field {field!r} must be an object.")
    if not isinstance(files, dict) or not isinstance(manifest.get("created_by"), str):
        raise CorruptArtifactError(f"{path}: the fields 'files' and 'created_by' are needed.")
    for name, entry in files.items():
        check_file_name(name, str(path))
        sound = (
            isinstance(entry, dict)
            and entry.keys() == {"bytes", "sha256"}
            and type(entry["bytes"]) is int
            and isinstance(entry["sha256"], str)
            and _SHA256.match(entry["sha256"])
        )
        if not sound:
            raise CorruptArtifactError(f"{path}: the entry of {name!r} must have bytes and sha256.")


def check_file_name(name: str, where: str) -> None:
    """Refuse a listed name that is not relative, normal and portable.

    Raises:
        CorruptArtifactError: The name is refused.
    """
    parts = name.split("/")
    normal = PurePosixPath(name).as_posix() == name and not {"", ".", ".."} & set(parts)
    if not normal or name == MANIFEST or any(not c.isprintable() or c in "\\:" for c in name):
        raise CorruptArtifactError(
            f"{where}: {name!r} cannot be the name of a file in an artefact. Use a relative name of "
            f"printable characters without '..', ':' or a backslash."
        )
