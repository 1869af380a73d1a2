"""The rows of a corpus job: where each shard of them lies in a file, proven by hashes."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from lmopt.errors import ArtifactNotFoundError, CorruptArtifactError, InputError

JSON_SUFFIXES: Final = (".jsonl", ".ndjson", ".json")
_TOLD_EVERY: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Shard:
    """A stretch of rows.

    Attributes:
        number: Its place among the shards, from 0.
        first_row: Number of its first row in the input.
        rows: Rows in it.
        start: Byte of the file where it begins.
        stop: Byte after its end.
        sha256: Of the bytes between.
    """

    number: int
    first_row: int
    rows: int
    start: int
    stop: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A file of rows, cut into shards.

    Attributes:
        path: The file.
        is_json: Whether each line is a JSON object; else it is a text.
        rows: Rows in all; empty lines are none.
        sha256: Of the whole file.
        shards: In order.
    """

    path: Path
    is_json: bool
    rows: int
    sha256: str
    shards: tuple[Shard, ...]


def index(path: Path, rows_per_shard: int, *, progress: Callable[[str, int, int], None]) -> Inputs:
    """Read a file once and note where its shards lie.

    Args:
        path: `.jsonl`, `.ndjson` or `.json` for one JSON object a line; else one text a line.
        rows_per_shard: Rows a shard, at least 1.
        progress: Called with the stage's name, bytes read and their total.

    Raises:
        ArtifactNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise ArtifactNotFoundError(
            f"{path} is no file; give a .jsonl file, a text file with a prompt a line, or an iterable of prompts"
        )
    size, whole, shards = path.stat().st_size, hashlib.sha256(), list[Shard]()
    part, start, place, rows, total = hashlib.sha256(), 0, 0, 0, 0
    with path.open("rb") as file:
        for line in file:
            whole.update(line)
            part.update(line)
            place += len(line)
            if not line.strip():
                continue
            rows, total = rows + 1, total + 1
            if rows == rows_per_shard:
                shards.append(Shard(len(shards), total - rows, rows, start, place, part.hexdigest()))
                part, start, rows = hashlib.sha256(), place, 0
            if total % _TOLD_EVERY == 0:
                progress("read inputs", place, size)
    if rows:
        shards.append(Shard(len(shards), total - rows, rows, start, place, part.hexdigest()))
    is_json = path.suffix.lower() in JSON_SUFFIXES
    return Inputs(path, is_json, total, whole.hexdigest(), tuple(shards))


def read_shard(path: Path, shard: Shard) -> list[bytes]:
    """Read the lines of a shard.

    Raises:
        CorruptArtifactError: The file is not what it was when the job began.
    """
    try:
        with path.open("rb") as file:
            file.seek(shard.start)
            content = file.read(shard.stop - shard.start)
    except OSError as error:
        raise CorruptArtifactError(
            f"{path} cannot be read ({error}). On several machines it must lie under the same path on all."
        ) from error
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise CorruptArtifactError(
            f"{path} changed while the job ran: rows {shard.first_row} to {shard.first_row + shard.rows - 1} are not "
            "what they were. Put the old file back, or start anew in another output folder."
        )
    return [line for line in content.split(b"\n") if line.strip()]


def spool(rows: Iterable[Any], path: Path) -> None:
    """Write an iterable of rows to a file that can be read again when the job is resumed.

    Args:
        rows: Texts, rows of token ids, or mappings with a prompt and other fields.
        path: JSONL file to write.

    Raises:
        InputError: A row is none of these, or holds what JSON cannot.
    """
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            _write_row(file, number, row)


def _write_row(file: IO[str], number: int, row: Any) -> None:
    if isinstance(row, np.ndarray):
        row = row.tolist()
    if isinstance(row, str | list | tuple):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise InputError(
            f"input {number} is a {type(row).__name__}; expected a text, a row of token ids, or a mapping with the "
            "field 'prompt'"
        )
    try:
        # ASCII: a lone surrogate, which UTF-8 has no bytes for, is a matter of its row alone.
        file.write(json.dumps(dict(row), allow_nan=False) + "\n")
    except (TypeError, ValueError) as error:
        raise InputError(f"input {number} cannot be written as JSON: {error}") from error
