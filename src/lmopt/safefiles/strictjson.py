"""JSON without the parts that two readers understand differently."""

import json
import math
import os
from typing import Any, Final, NoReturn

from lmopt.errors import CorruptArtifactError
from lmopt.safefiles.paths import open_regular

DEFAULT_LIMIT: Final = 64 * 1024 * 1024
"""Largest JSON file read unless told otherwise, in bytes; big tokenizers reach 20 MB."""
MAX_VALUES: Final = 4_000_000
"""Most values of a JSON file; a vocabulary of 256,000 with its merges has 2,000,000."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing a key that occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1) if len(names) < 10_000 else "..."
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found


def _finite(text: str) -> float:
    """Parse a number, refusing one that overflows to infinity."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is out of range")
    return number


def _refuse(text: str) -> NoReturn:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{text} is not JSON")


DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)


def parse_json(raw: bytes, what: str, *, values: int = MAX_VALUES) -> Any:
    """Parse JSON strictly: UTF-8, no duplicate key, no NaN, no infinity.

    Args:
        raw: The text.
        what: File name for the error message.
        values: Most values that it may hold, since each takes far more memory than text.

    Raises:
        CorruptArtifactError: It is not such JSON.
    """
    # Separators are counted, those in texts too: an upper bound that costs nothing.
    if sum(map(raw.count, (b",", b"[", b"{"))) > values:
        raise CorruptArtifactError(f"{what} holds more than {values} JSON values.")
    try:
        return DECODER.decode(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CorruptArtifactError(f"{what} is not valid JSON: {reason}.") from None


def read_json(path: str | os.PathLike[str], *, limit: int = DEFAULT_LIMIT) -> Any:
    """Read a JSON file strictly; see `parse_json`.

    Args:
        path: The file.
        limit: Largest size accepted, in bytes.

    Raises:
        ArtifactNotFoundError: There is no such file.
        CorruptArtifactError: It is larger than `limit` or not strict JSON.
    """
    name = os.fspath(path)
    with open_regular(path) as (file, size):
        if size > limit:
            raise CorruptArtifactError(f"{name} holds {size} bytes of JSON; at most {limit} are read.")
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise CorruptArtifactError(f"{name} grew while it was read.")
    return parse_json(raw, name)
