"""Check a GGUF file without believing any count or length in it.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Values of arrays (vocabulary,
merges) are skipped, not kept: what a caller needs of an untrusted file is that it is whole.
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from lmopt.errors import CorruptArtifactError
from lmopt.safefiles.paths import open_regular

MAX_TEXT: Final = 16 * 1024 * 1024
"""Longest single string kept, in bytes; a chat template takes kilobytes."""
MAX_KEY: Final = 65_535
"""Longest key or tensor name, in bytes: the format's own limit for keys."""
MAX_ITEMS: Final = 2_000_000
"""Most strings in arrays, keys and tensors together; a vocabulary with its merges stays below 1e6."""

# Type id -> struct format; 7 is a bool, 8 a string, 9 an array.
SCALARS: Final[dict[int, str]] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9

# Tensor type id -> (weights a block, bytes a block), from ggml's type traits.
BLOCKS: Final[dict[int, tuple[int, int]]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata, whose values were checked and skipped.

    Attributes:
        type: Type id of its elements.
        count: Number of elements.
    """

    type: int
    count: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor.

    Attributes:
        type: Type id, such as 3 for Q4_1.
        shape: Sizes as stored, the contiguous axis first.
        offset: First byte, counted from the start of the data.
        bytes: Size of the data.
    """

    type: int
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Header of a valid GGUF file.

    Attributes:
        version: 2 or 3.
        metadata: Scalars and strings by key; arrays as `GgufArray`.
        tensors: Tensors by name.
        data_offset: Where in the file the data start, in bytes.
    """

    version: int
    metadata: Mapping[str, Scalar | GgufArray]
    tensors: Mapping[str, GgufTensor]
    data_offset: int


def check_gguf(path: str | os.PathLike[str]) -> GgufHeader:
    """Check that a file is GGUF, whole, and can be understood in one way only.

    Raises:
        ArtifactNotFoundError: There is no such file.
        CorruptArtifactError: A count, length, offset or type is impossible; the message says which.
    """
    with open_regular(path) as (raw, size), BufferedReader(raw, 256 * 1024) as file:
        return _Reader(file, size, os.fspath(path)).header()


def read_tensor(path: str | os.PathLike[str], header: GgufHeader, name: str) -> NDArray[np.uint8]:
    """Read the bytes of one tensor of a file whose header was checked.

    Args:
        path: The file.
        header: From `check_gguf` of the same file.
        name: The tensor's name.

    Returns:
        `(bytes,)` uint8.

    Raises:
        ArtifactNotFoundError: There is no such file any more.
        CorruptArtifactError: The file has been cut off since.
    """
    tensor = header.tensors[name]
    with open_regular(path) as (file, _):
        file.seek(header.data_offset + tensor.offset)
        data = np.fromfile(file, np.uint8, tensor.bytes)
    if len(data) != tensor.bytes:
        raise CorruptArtifactError(f"{os.fspath(path)} has been cut off since its header was read.")
    return data


class _Reader:
    """A cursor over one file that knows how many bytes and items are left."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self._file = file
        self._size = size
        self._name = name
        self._position = 0
        self._items_left = MAX_ITEMS

    def header(self) -> GgufHeader:
        if self._take(4, "magic") != b"GGUF":
            raise self._bad("it does not begin with 'GGUF'; it is another kind of file")
        version = self._number("<I", "version")
        if version not in (2, 3):
            raise self._bad(f"version {version:#x} is not supported; expected 2 or 3, little-endian")
        tensor_count = self._count("tensor count", smallest=24)
        pair_count = self._count("metadata count", smallest=13)
        metadata: dict[str, Scalar | GgufArray] = {}
        for _ in range(pair_count):
            key = self._text(MAX_KEY, "a metadata key")
            if key in metadata:
                raise self._bad(f"the metadata key {key!r} occurs twice")
            metadata[key] = self._value(self._number("<I", f"type of {key!r}"), f"{key!r}")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise self._bad(f"general.alignment is {alignment!r}, not a power of two")
        tensors: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            key = self._text(MAX_KEY, "a tensor name")
            if key in tensors:
                raise self._bad(f"the tensor {key!r} occurs twice")
            tensors[key] = self._tensor(key)
        start = -(-self._position // alignment) * alignment
        self._check_cover(tensors, start, alignment)
        return GgufHeader(version, metadata, tensors, start)

    def _tensor(self, key: str) -> GgufTensor:
        axes = self._number("<I", f"axes of tensor {key!r}")
        if axes > 4:
            raise self._bad(f"tensor {key!r} has {axes} axes; the format allows 4")
        shape = tuple(self._number("<Q", f"shape of tensor {key!r}") for _ in range(axes))
        kind = self._number("<I", f"type of tensor {key!r}")
        offset = self._number("<Q", f"offset of tensor {key!r}")
        if kind not in BLOCKS:
            raise self._bad(f"tensor {key!r} has the unknown type {kind}")
        weights, size = BLOCKS[kind]
        if math.prod(one or 1 for one in shape) >= 2**63:  # a zero may hide a product that wraps around
            raise self._bad(f"tensor {key!r} has the impossible shape {shape}")
        if (shape[0] if shape else 1) % weights:
            raise self._bad(f"tensor {key!r} of shape {shape} does not divide into blocks of {weights}")
        return GgufTensor(kind, shape, offset, math.prod(shape) // weights * size)

    def _check_cover(self, tensors: Mapping[str, GgufTensor], start: int, alignment: int) -> None:
        """Check that tensors follow each other in the file, apart from padding."""
        position = start
        for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
            begin = start + tensor.offset
            if tensor.offset % alignment:
                raise self._bad(f"tensor {key!r} is not aligned to {alignment} bytes")
            if begin + tensor.bytes > self._size:
                raise self._bad(f"tensor {key!r} ends at byte {begin + tensor.bytes}; the file is truncated")
            if not 0 <= begin - position < alignment:
                kind = "overlaps another" if begin < position else "leaves a hole before it"
                raise self._bad(f"tensor {key!r} {kind}")
            position = begin + tensor.bytes
        if tensors and self._size - position >= alignment:
            raise self._bad(f"{self._size - position} foreign bytes follow its last tensor")
        if not tensors and self._size > start:
            raise self._bad(f"{self._size - start} foreign bytes follow its header")

    def _value(self, kind: int, where: str) -> Scalar | GgufArray:
        if kind == STRING:
            return self._text(MAX_TEXT, where)
        if kind == ARRAY:
            return self._array(where)
        if kind not in SCALARS:
            raise self._bad(f"{where} has the unknown type {kind}")
        value: int | float = self._number(SCALARS[kind], where)
        if kind == BOOL and value not in (0, 1):
            raise self._bad(f"{where} is a truth value of {value}")
        return bool(value) if kind == BOOL else value

    def _array(self, where: str) -> GgufArray:
        kind = self._number("<I", f"element type of {where}")
        if kind not in SCALARS and kind != STRING:
            raise self._bad(f"{where} is an array of the unknown type {kind}")
        count = self._number("<Q", f"length of {where}")
        if kind == STRING:
            self._spend(count, where)
            for _ in range(count):
                self._skip(self._number("<Q", where), where)
        else:
            self._skip(count * struct.calcsize(SCALARS[kind]), where)
        return GgufArray(kind, count)

    def _count(self, where: str, smallest: int) -> int:
        """Read a number of entries of at least `smallest` bytes each."""
        count: int = self._number("<Q", where)
        if count * smallest > self._size - self._position:
            raise self._bad(f"the {where} {count} is more than the file can hold")
        self._spend(count, where)
        return count

    def _spend(self, items: int, where: str) -> None:
        self._items_left -= items
        if self._items_left < 0:
            raise self._bad(f"{where}: more than {MAX_ITEMS} items in one header are not read")

    def _number(self, form: str, where: str) -> int:
        # Annotated as int for the many counts; floats come through `_value` only.
        value: int = struct.unpack(form, self._take(struct.calcsize(form), where))[0]
        return value

    def _text(self, limit: int, where: str) -> str:
        length = self._number("<Q", f"length of {where}")
        if length > limit:
            raise self._bad(f"{where} states {length} bytes; at most {limit} are read")
        try:
            return self._take(length, where).decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"{where} is not UTF-8") from None

    def _take(self, length: int, where: str) -> bytes:
        if length > self._size - self._position:
            raise self._bad(f"{where} lies beyond the end of the file")
        taken = self._file.read(length)
        self._position += length
        if len(taken) != length:
            raise self._bad("it shrank while it was read")
        return taken

    def _skip(self, length: int, where: str) -> None:
        if length > self._size - self._position:
            raise self._bad(f"{where} lies beyond the end of the file")
        self._position += length
        self._file.seek(length, os.SEEK_CUR)

    def _bad(self, reason: str) -> CorruptArtifactError:
        return CorruptArtifactError(f"{self._name} is not a valid GGUF file: {reason}. Get a fresh copy.")
