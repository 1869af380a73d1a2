"""Check safetensors files and shard indexes against the format's own rules, header only.

The rules are those of https://github.com/huggingface/safetensors#format, including one that its
reference reader skips: duplicate keys are disallowed.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lmopt.errors import CorruptArtifactError
from lmopt.safefiles.paths import contained, open_regular
from lmopt.safefiles.strictjson import DECODER, read_json

MAX_HEADER: Final = 100_000_000
"""Largest header of the format, in bytes."""
MAX_TENSORS: Final = 150_000
"""Most tensors in one file; the largest mixtures of experts have 140,000 in all their shards."""
MAX_ENTRY: Final = 4096
"""Longest text of one tensor's entry, in characters."""
MAX_METADATA: Final = 4_000_000
"""Longest text of `__metadata__`, in characters."""

DTYPE_BITS: Final[dict[str, int]] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

_BLANK: Final = re.compile(r"[ \t\n\r]*")
_COLON: Final = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        dtype: The format's name, such as `"F32"`.
        shape: Sizes.
        begin: First byte, counted from the end of the header.
        end: Byte after the last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """Header of a valid safetensors file.

    Attributes:
        tensors: Tensors by name.
        metadata: Free text of the writer.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def check_safetensors(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Check that a file is safetensors, whole, and can be understood in one way only.

    Raises:
        ArtifactNotFoundError: There is no such file.
        CorruptArtifactError: A rule of the format is broken; the message names file and rule.
    """
    name = os.fspath(path)
    with open_regular(path) as (file, size):
        if size < 8:
            raise CorruptArtifactError(f"{name}: {size} bytes are too few for a safetensors file.")
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER, size - 8):
            raise CorruptArtifactError(
                f"{name}: it states a header of {length} bytes; the file has {size} bytes and the format "
                f"allows {MAX_HEADER}. The file is truncated or not safetensors: get a fresh copy."
            )
        raw = file.read(length)
    if len(raw) < length or raw[:1] != b"{":
        raise CorruptArtifactError(f"{name}: its header does not begin with '{{'; it is not safetensors.")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] | None = None
    for key, value in _members(raw, name):
        if key == "__metadata__" and metadata is None:
            metadata = _metadata(value, name)
        elif key in tensors or key == "__metadata__":
            raise CorruptArtifactError(f"{name}: the key {key!r} occurs twice in its header.")
        elif len(tensors) == MAX_TENSORS:
            raise CorruptArtifactError(f"{name}: more than {MAX_TENSORS} tensors in one file are not read.")
        else:
            tensors[key] = _tensor(value, f"{name}: tensor {key!r}")
    _check_cover(tensors, size - 8 - length, name)
    return SafetensorsHeader(tensors, metadata or {})


def _members(raw: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """Parse the header's object one member at a time, to hold no more than one in memory.

    Raises:
        CorruptArtifactError: It is not strict JSON.
    """
    try:
        text = raw.decode("utf-8").rstrip(" \t\n\r")
        position, opener = 0, "{"
        while text != "{}":
            if text[position] != opener:
                raise ValueError(f"{opener!r} is expected at character {position}")
            position = _BLANK.match(text, position + 1).end()  # type: ignore[union-attr]  # always matches
            if text[position] != '"':
                raise ValueError(f"a name is expected at character {position}")
            key, position = DECODER.raw_decode(text, position)
            colon = _COLON.match(text, position)
            if colon is None:
                raise ValueError(f"':' is expected at character {position}")
            longest = MAX_METADATA if key == "__metadata__" else MAX_ENTRY
            value, length = DECODER.raw_decode(text[colon.end() : colon.end() + longest])
            yield key, value
            position = _BLANK.match(text, colon.end() + length).end()  # type: ignore[union-attr]
            if text[position] == "}" and position == len(text) - 1:
                return
            opener = ","
    except (ValueError, IndexError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "it is cut off or nested too deeply"
        raise CorruptArtifactError(f"{name}: its header is not valid JSON: {reason}.") from None


def _metadata(value: Any, name: str) -> dict[str, str]:
    """Check the free text of the writer."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CorruptArtifactError(f"{name}: __metadata__ must map names to text.")
    return value


def _tensor(entry: Any, where: str) -> StoredTensor:
    """Check one entry of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptArtifactError(f"{where} must have exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CorruptArtifactError(f"{where} has the unknown dtype {dtype!r}.")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CorruptArtifactError(f"{where}: shape and data_offsets must be lists of whole numbers.")
    if math.prod(size or 1 for size in shape) >= 2**63:  # a zero may hide a product that wraps around
        raise CorruptArtifactError(f"{where} has the impossible shape {shape}.")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise CorruptArtifactError(
            f"{where}: {dtype} of shape {shape} takes {bits / 8:g} bytes, its offsets span {end - begin}."
        )
    return StoredTensor(dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    """Say whether a value is a short list of numbers that fit a file offset (`bool` is none)."""
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )


def _check_cover(tensors: Mapping[str, StoredTensor], size: int, name: str) -> None:
    """Check that the tensors fill the data without a hole, an overlap or trailing bytes."""
    position = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            kind = "overlaps another" if tensor.begin < position else "leaves a hole before it"
            raise CorruptArtifactError(f"{name}: tensor {key!r} {kind} (at byte {tensor.begin} of the data).")
        position = tensor.end
    if position != size:
        raise CorruptArtifactError(
            f"{name}: its tensors take {position} bytes, the file has {size} after the header. "
            f"It is truncated or has foreign bytes at its end: get a fresh copy."
        )


def check_shard_index(
    path: str | os.PathLike[str], *, allow_symlinks_into: str | os.PathLike[str] | None = None
) -> tuple[Path, ...]:
    """Check `model.safetensors.index.json` and every shard that it names.

    Args:
        path: The index.
        allow_symlinks_into: See `contained`.

    Returns:
        Paths of the shards, sorted.

    Raises:
        UnsafeArtifactError: A shard lies outside the folder.
        ArtifactNotFoundError: The index or a shard is missing.
        CorruptArtifactError: The index or a shard is malformed, or a shard lacks a tensor.
    """
    name = os.fspath(path)
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptArtifactError(f"{name}: weight_map must map tensors to shard files.")
    tensors_of: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CorruptArtifactError(
                f"{name}: tensor {tensor!r} is mapped to {shard!r}, not a .safetensors file."
            )
        tensors_of.setdefault(shard, []).append(tensor)
    folder = Path(path).parent
    shards = []
    for shard, tensors in sorted(tensors_of.items()):
        shards.append(contained(folder, shard, allow_symlinks_into=allow_symlinks_into))
        stored = check_safetensors(shards[-1]).tensors
        for tensor in tensors:
            if tensor not in stored:
                raise CorruptArtifactError(f"{name}: the shard {shard} lacks the tensor {tensor!r}.")
    return tuple(shards)
