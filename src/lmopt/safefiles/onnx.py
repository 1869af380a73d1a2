"""Check where an ONNX model's external data lie, before any library opens the model.

The `.onnx` file is a protobuf message. This walks just the fields that lead to tensors (field
numbers from onnx.proto3), reads nothing it can skip, and needs neither `onnx` nor `protobuf`.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

from lmopt.errors import CorruptArtifactError
from lmopt.safefiles.paths import contained, open_regular
from lmopt.types import TensorSpec

MAX_FILE: Final = 2**31
"""Protobuf's own limit, in bytes."""
MAX_FIELDS: Final = 750_000
"""Most fields visited; a graph of 50,000 nodes stays below it."""
MAX_DEPTH: Final = 100
"""Deepest nesting of messages, as in protobuf."""
MAX_AXES: Final = 64
MAX_TEXT: Final = 4096
"""Longest key or value of an external-data entry, in bytes."""

# Message -> field number -> message of that field; other fields are skipped.
LEADS_TO: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
DTYPE_BITS: Final[dict[int, int]] = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((27, 28), 6),
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}
DTYPE_NAMES: Final[dict[int, str]] = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"
}  # fmt: skip
ENTRY_KEYS: Final = frozenset({"location", "offset", "length", "checksum"})


@dataclass(frozen=True, slots=True)
class ExternalData:
    """Where the bytes of one tensor lie.

    Attributes:
        tensor: Name of the tensor.
        location: File name as the model states it.
        path: That file, contained in the model's folder.
        offset: First byte.
        length: Number of bytes.
    """

    tensor: str
    location: str
    path: Path
    offset: int
    length: int


def check_onnx_external_data(
    path: str | os.PathLike[str],
    *,
    allow_symlinks_into: str | os.PathLike[str] | None = None,
    allow_hardlinks: bool = False,
) -> tuple[ExternalData, ...]:
    """Find all external data of a model: initializers, attributes, subgraphs, functions, training.

    Args:
        path: The `.onnx` file; locations are relative to its folder.
        allow_symlinks_into: See `contained`.
        allow_hardlinks: See `contained`; give `True` only for files whose hash is known.

    Raises:
        ArtifactNotFoundError: The model or a file that it names is missing.
        UnsafeArtifactError: A location lies outside the folder, or is a hard link.
        CorruptArtifactError: The protobuf is malformed, or a tensor's range lies outside its file
            or does not fit its shape.
    """
    name = os.fspath(path)
    found: list[ExternalData] = []
    files: dict[str, tuple[Path, int]] = {}
    with open_regular(path) as (file, size):
        if not 0 < size <= MAX_FILE:
            raise CorruptArtifactError(f"{name}: an ONNX model has 1 to {MAX_FILE} bytes; this has {size}.")
        for tensor in _Walk(file, size, name).tensors():
            if not tensor.entries and not tensor.external:
                continue
            where = f"{name}: tensor {tensor.name!r}"
            location = tensor.entries.get("location")
            if location is None or tensor.inline or not tensor.external:
                raise CorruptArtifactError(
                    f"{where} must have either its bytes in the model or the location of an external file."
                )
            if location not in files:
                target = contained(
                    Path(path).parent,
                    location,
                    allow_symlinks_into=allow_symlinks_into,
                    allow_hardlinks=allow_hardlinks,
                )
                files[location] = target, target.stat().st_size
            target, available = files[location]
            offset, length = _range(tensor, where)
            if offset + length > available:
                raise CorruptArtifactError(
                    f"{where} takes bytes {offset} to {offset + length} of {location}, "
                    f"which has {available}. The file is truncated or belongs to another model."
                )
            found.append(ExternalData(tensor.name, location, target, offset, length))
    return tuple(found)


def onnx_boundary(path: str | os.PathLike[str]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Read what a graph takes and what it gives, as `lmopt.signature.Signature.from_graph` wants it.

    For engines whose own reader forgets the names of dynamic axes: without them nobody can tell which axis of a
    state grows. Inputs that only carry a default value are left out.

    Args:
        path: The `.onnx` file.

    Returns:
        Inputs and outputs, in the graph's order.

    Raises:
        ArtifactNotFoundError: There is no such file.
        CorruptArtifactError: The protobuf is malformed.
    """
    with open_regular(path) as (file, size):
        return _Walk(file, size, os.fspath(path)).boundary()


@dataclass(slots=True)
class _Tensor:
    """The fields of a TensorProto that say where its bytes are."""

    name: str
    dtype: int
    shape: list[int]
    entries: dict[str, str]
    external: bool
    inline: bool


def _range(tensor: _Tensor, where: str) -> tuple[int, int]:
    """Return offset and length of the data, checked against shape and element type."""
    # A size is below zero where its varint is above 2**63; a zero may hide a product that wraps around.
    impossible = math.prod(size or 1 for size in tensor.shape) >= 2**63
    if tensor.dtype not in DTYPE_BITS or impossible:
        raise CorruptArtifactError(
            f"{where}: type {tensor.dtype} of shape {tensor.shape[:8]} has no known size."
        )
    expected = -(-math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8)
    numbers = {}
    for key, default in (("offset", 0), ("length", expected)):
        text = tensor.entries.get(key, str(default))
        if not (text.isascii() and text.isdigit() and len(text) <= 19):
            raise CorruptArtifactError(f"{where}: its {key} {text[:40]!r} is not a whole number.")
        numbers[key] = int(text)
    if numbers["length"] != expected:
        raise CorruptArtifactError(
            f"{where}: its shape takes {expected} bytes, it states {numbers['length']}."
        )
    return numbers["offset"], expected


class _Walk:
    """Reads one protobuf file through a small window."""

    WINDOW = 64 * 1024

    def __init__(self, file: FileIO, size: int, name: str) -> None:
        self._file = file
        self._size = size
        self._name = name
        self._start = 0
        self._window = b""
        self._fields_left = MAX_FIELDS

    def tensors(self) -> Iterator[_Tensor]:
        """Visit every TensorProto of the model, however deep, without recursion."""
        stack = [("model", self._fields(0, self._size))]
        while stack:
            message, fields = stack[-1]
            for number, wire, start, stop in fields:
                inner = LEADS_TO[message].get(number)
                if inner is None:
                    continue
                self._expect(wire == 2)
                if inner == "tensor":
                    yield self._tensor(start, stop)
                    continue
                if len(stack) == MAX_DEPTH:
                    raise self._bad("its graphs are nested too deeply")
                stack.append((inner, self._fields(start, stop)))
                break
            else:
                stack.pop()

    def boundary(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Read inputs and outputs of the main graph."""
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        stored: set[str] = set()
        for begin, end in self._inside(0, self._size, 7):
            for number, wire, start, stop in self._fields(begin, end):
                if number in (5, 11, 12):
                    self._expect(wire == 2)
                    if number == 5:
                        stored.add(self._tensor(start, stop).name)
                    else:
                        (inputs if number == 11 else outputs).append(self._value(start, stop))
        return tuple(one for one in inputs if one.name not in stored), tuple(outputs)

    def _value(self, begin: int, end: int) -> TensorSpec:
        """Read one ValueInfoProto that is a tensor; an axis without size or name is called `"?"`."""
        name, dtype = "", 0
        shape: list[int | str] = []
        for start, stop in self._inside(begin, end, 1):
            name = self._text(start, min(stop, start + MAX_TEXT))
        tensors = [one for place in self._inside(begin, end, 2) for one in self._inside(*place, 1)]
        for tensor in tensors:
            for number, wire, start, stop in self._fields(*tensor):
                if number == 1:
                    self._expect(wire == 0)
                    dtype = self._varint(start, stop)[0]
            axes = [one for place in self._inside(*tensor, 2) for one in self._inside(*place, 1)]
            self._expect(len(axes) <= MAX_AXES)
            shape += [self._axis(*axis) for axis in axes]
        return TensorSpec(name, DTYPE_NAMES.get(dtype, f"type {dtype}"), tuple(shape))

    def _axis(self, begin: int, end: int) -> int | str:
        for number, wire, start, stop in self._fields(begin, end):
            if number == 1:
                size = self._varint(start, stop)[0]
                self._expect(wire == 0 and size < 2**63)
                return size
            if number == 2:
                self._expect(wire == 2)
                return self._text(start, min(stop, start + MAX_TEXT))
        return "?"

    def _inside(self, begin: int, end: int, wanted: int) -> list[tuple[int, int]]:
        """List where the messages (or texts) of one field lie."""
        places = []
        for number, wire, start, stop in self._fields(begin, end):
            if number == wanted:
                self._expect(wire == 2)
                places.append((start, stop))
        return places

    def _tensor(self, begin: int, end: int) -> _Tensor:
        tensor = _Tensor("", 0, [], {}, external=False, inline=False)
        for number, wire, start, stop in self._fields(begin, end):
            if number == 1:  # dims: packed or one by one
                if wire == 0:
                    tensor.shape.append(self._varint(start, stop)[0])
                while wire == 2 and start < stop:
                    size, start = self._varint(start, stop)
                    tensor.shape.append(size)
                    self._expect(len(tensor.shape) <= MAX_AXES)
                self._expect(len(tensor.shape) <= MAX_AXES)
            elif number in (2, 14):
                self._expect(wire == 0)
                value = self._varint(start, stop)[0]
                if number == 2:
                    tensor.dtype = value
                else:
                    tensor.external = value == 1
            elif number == 8:
                tensor.name = self._text(start, min(stop, start + MAX_TEXT))
            elif number == 13:
                self._expect(wire == 2)
                self._add_entry(tensor, start, stop)
            elif number in (4, 5, 6, 7, 9, 10, 11):  # *_data, raw_data
                tensor.inline = tensor.inline or stop > start
        return tensor

    def _add_entry(self, tensor: _Tensor, begin: int, end: int) -> None:
        """Read one StringStringEntryProto of `external_data`."""
        pair = {1: "", 2: ""}
        for number, wire, start, stop in self._fields(begin, end):
            self._expect(wire == 2 and number in pair and stop - start <= MAX_TEXT)
            pair[number] = self._text(start, stop)
        # Readers differ in which of two equal keys wins, and some take unknown ones as attributes.
        if pair[1] not in ENTRY_KEYS or pair[1] in tensor.entries:
            raise self._bad(
                f"tensor {tensor.name!r} has an unknown or repeated external-data key {pair[1][:40]!r}"
            )
        tensor.entries[pair[1]] = pair[2]

    def _fields(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (number, wire type, start, stop) of each field of a message."""
        position = begin
        while position < end:
            self._fields_left -= 1
            if self._fields_left < 0:
                raise self._bad(f"it has more than {MAX_FIELDS} fields")
            tag, start = self._varint(position, end)
            wire = tag & 7
            if wire == 0:
                stop = self._varint(start, end)[1]
            elif wire == 2:
                length, start = self._varint(start, end)
                stop = start + length
            else:
                self._expect(wire in (1, 5))
                stop = start + (8 if wire == 1 else 4)
            self._expect(0 < tag >> 3 < 2**29 and stop <= end)
            yield tag >> 3, wire, start, stop
            position = stop

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """Read a variable-length integer; return it and the position behind it."""
        index = position - self._start
        if 0 <= index < len(self._window) and position < end and self._window[index] < 0x80:
            return self._window[index], position + 1  # nearly all are one byte
        if not 0 <= index <= len(self._window) - 10:
            self._window = os.pread(self._file.fileno(), self.WINDOW, position)
            self._start, index = position, 0
        value = shift = 0
        for byte in self._window[index : index + min(10, end - position)]:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value, position + shift // 7
        raise self._bad("a number is cut off")

    def _text(self, start: int, stop: int) -> str:
        raw = os.pread(self._file.fileno(), stop - start, start)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad("a name is not UTF-8") from None

    def _expect(self, condition: bool) -> None:
        if not condition:
            raise self._bad("its protobuf structure is malformed or cut off")

    def _bad(self, reason: str) -> CorruptArtifactError:
        return CorruptArtifactError(f"{self._name} is not a valid ONNX model: {reason}. Get a fresh copy.")
