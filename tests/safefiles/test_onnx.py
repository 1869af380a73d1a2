"""ONNX: every external tensor is found, wherever it hides, and its file lies in the model's folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmopt.errors import ArtifactError, ArtifactNotFoundError, CorruptArtifactError, UnsafeArtifactError
from lmopt.safefiles import check_onnx_external_data, onnx_boundary
from lmopt.types import TensorSpec

# A tiny protobuf writer: hostile files must not depend on what `onnx` agrees to write. -----------


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(key: str, value: str) -> bytes:
    return field(13, field(1, key.encode()) + field(2, value.encode()))


def tensor(
    name: str, entries: dict[str, str], shape: tuple[int, ...] = (4,), dtype: int = 1, extra: bytes = b""
) -> bytes:
    dims = b"".join(field(1, size) for size in shape)
    pairs = b"".join(entry(key, value) for key, value in entries.items())
    return dims + field(2, dtype) + field(8, name.encode()) + pairs + field(14, 1) + extra


def model(graph: bytes, extra: bytes = b"") -> bytes:
    return field(1, 10) + field(7, graph) + extra


def one(location: str, shape: tuple[int, ...] = (4,), dtype: int = 1, **more: str) -> bytes:
    return model(field(5, tensor("w", {"location": location, **more}, shape, dtype)))


def attribute(content: bytes) -> bytes:
    return field(1, b"value") + content


NODE, INITIALIZER, SPARSE = 1, 5, 15
EXTERNAL = tensor("w", {"location": "data.bin"})
# Where a TensorProto may be, as a model around it.
PLACES: dict[str, Callable[[bytes], bytes]] = {
    "initializer": lambda t: model(field(INITIALIZER, t)),
    "sparse values": lambda t: model(field(SPARSE, field(1, t))),
    "sparse indices": lambda t: model(field(SPARSE, field(2, t))),
    "attribute": lambda t: model(field(NODE, field(5, attribute(field(5, t))))),
    "attribute list": lambda t: model(field(NODE, field(5, attribute(field(10, t))))),
    "sparse attribute": lambda t: model(field(NODE, field(5, attribute(field(22, field(1, t)))))),
    "sparse attribute list": lambda t: model(field(NODE, field(5, attribute(field(23, field(1, t)))))),
    "subgraph": lambda t: model(field(NODE, field(5, attribute(field(6, field(INITIALIZER, t)))))),
    "subgraph list": lambda t: model(field(NODE, field(5, attribute(field(11, field(INITIALIZER, t)))))),
    "function": lambda t: model(b"", field(25, field(7, field(5, attribute(field(5, t)))))),
    "function default": lambda t: model(b"", field(25, field(11, attribute(field(5, t))))),
    "training": lambda t: model(b"", field(20, field(2, field(INITIALIZER, t)))),
    "second graph field": lambda t: model(b"") + field(7, field(INITIALIZER, t)),
    "behind inline weights": lambda t: model(
        field(INITIALIZER, field(8, b"big") + field(9, bytes(300_000))) + field(INITIALIZER, t)
    ),
}


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(raw)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "data.bin").write_bytes(bytes(64))
    (inside / "empty.bin").write_bytes(b"")
    (tmp_path / "secret").write_bytes(bytes(64))
    (inside / "link").symlink_to("../secret")
    (inside / "folder-link").symlink_to("..")
    (inside / "hard").hardlink_to(tmp_path / "secret")
    return inside


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_found_in_every_place(folder: Path, place: Callable[[bytes], bytes]) -> None:
    (found,) = check_onnx_external_data(write(folder, place(EXTERNAL)))
    assert (found.tensor, found.location, found.offset, found.length) == ("w", "data.bin", 0, 16)
    assert found.path == folder / "data.bin"


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_attack_in_every_place(folder: Path, place: Callable[[bytes], bytes]) -> None:
    with pytest.raises(UnsafeArtifactError, match=r"\.\./secret"):
        check_onnx_external_data(write(folder, place(tensor("w", {"location": "../secret"}))))


LOCATIONS = {
    "parent": ("../secret", UnsafeArtifactError),
    "nested parent": ("a/../../secret", UnsafeArtifactError),
    "absolute": ("/etc/passwd", UnsafeArtifactError),
    "link": ("link", UnsafeArtifactError),
    "linked folder": ("folder-link/secret", UnsafeArtifactError),
    "hard link": ("hard", UnsafeArtifactError),
    "backslash": ("..\\secret", UnsafeArtifactError),
    "NUL": ("data.bin\0", CorruptArtifactError),
    "empty": ("", CorruptArtifactError),
    "folder": (".", UnsafeArtifactError),
    "memory address of ONNX Runtime": ("*/_ORT_MEM_ADDR_/*", ArtifactNotFoundError),
    "missing": ("nothing", ArtifactNotFoundError),
}


@pytest.mark.parametrize(("location", "error"), LOCATIONS.values(), ids=LOCATIONS)
def test_locations(folder: Path, location: str, error: type[ArtifactError]) -> None:
    with pytest.raises(error):
        check_onnx_external_data(write(folder, one(location)))


def test_hard_links_are_the_callers_choice(folder: Path) -> None:
    path = write(folder, one("hard"))
    assert len(check_onnx_external_data(path, allow_hardlinks=True)) == 1


MALFORMED = {
    "empty": b"",
    "text": b"this is not a model",
    "field 0": b"\0\0",
    "group": b"\x0b",
    "endless varint": b"\xff" * 20,
    "length beyond the end": b"\x3a\x7f",
    "length of 2**63": varint(7 << 3 | 2) + varint(2**63),
    "child longer than its parent": model(varint(5 << 3 | 2) + varint(10)) + bytes(20),
    "graph that is a number": field(7, 1),
    "offset beyond the end": one("data.bin", offset="49"),
    "offset of 2**62": one("data.bin", offset=str(2**62)),
    "negative offset": one("data.bin", offset="-4"),
    "hexadecimal offset": one("data.bin", offset="0x10"),
    "offset in other digits": one("data.bin", offset="\u0664"),
    "offset of 5000 digits": one("data.bin", offset="9" * 4000),
    "empty offset": one("data.bin", offset=""),
    "length that does not fit the shape": one("data.bin", length="12"),
    "petabyte": one("data.bin", shape=(2**50,), length=str(2**52)),
    "file too short": one("empty.bin"),
    "wrapping shape": one("data.bin", shape=(2**62, 4)),
    "zero that hides a huge shape": one("data.bin", shape=(0, 2**40, 2**40)),
    "negative size": one("data.bin", shape=(2**64 - 1,)),
    "texts": one("data.bin", dtype=8),
    "unknown type": one("data.bin", dtype=99),
    "unknown key": one("data.bin", __class__="x"),
    "repeated key": model(field(5, tensor("w", {"location": "../s"}, extra=entry("location", "data.bin")))),
    "no location": model(field(5, tensor("w", {"offset": "0"}))),
    "external without entries": model(field(5, tensor("w", {}))),
    "both external and inline": model(
        field(5, tensor("w", {"location": "data.bin"}, extra=field(9, bytes(16))))
    ),
    "entries without the mark": model(field(5, EXTERNAL + field(14, 0))),
    "100 axes": one("data.bin", shape=(1,) * 100),
    "100 packed axes": model(field(5, field(1, b"\1" * 100) + EXTERNAL)),
    "entry with a foreign field": model(field(5, EXTERNAL + field(13, field(3, b"x")))),
    "name that is not UTF-8": model(field(5, field(8, b"\xff") + field(13, b"") + field(14, 1))),
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
def test_malformed(folder: Path, raw: bytes) -> None:
    with pytest.raises(CorruptArtifactError, match=r"m\.onnx"):
        check_onnx_external_data(write(folder, raw))


def test_deep_nesting(folder: Path) -> None:
    graph = field(INITIALIZER, EXTERNAL)
    for _ in range(3000):
        graph = field(NODE, field(5, attribute(field(6, graph))))
    with pytest.raises(CorruptArtifactError, match="deeply"):
        check_onnx_external_data(write(folder, model(graph)))


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [(1, (3, 5), 60), (22, (3, 5), 8), (26, (5,), 2), (27, (4,), 3), (9, (), 1), (7, (0, 4), 0)],
)
def test_sizes(folder: Path, dtype: int, shape: tuple[int, ...], expected: int) -> None:
    (found,) = check_onnx_external_data(write(folder, one("data.bin", shape, dtype, offset="2")))
    assert (found.offset, found.length) == (2, expected)


def test_every_truncation_is_typed(folder: Path) -> None:
    raw = PLACES["subgraph"](EXTERNAL) + field(25, field(7, field(5, attribute(field(5, EXTERNAL)))))
    for length in range(len(raw)):
        try:
            found = check_onnx_external_data(write(folder, raw[:length]))
        except CorruptArtifactError:
            continue
        assert len(found) <= 1  # cut between two whole fields


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(PLACES)), st.data())
def test_damage_is_typed_and_never_leaves_the_folder(folder: Path, place: str, data: st.DataObject) -> None:
    raw = bytearray(PLACES[place](EXTERNAL)[:4000])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = check_onnx_external_data(write(folder, bytes(raw)))
    except ArtifactError:
        return
    for item in found:
        assert item.path.resolve().is_relative_to(folder)
        assert item.offset + item.length <= item.path.stat().st_size


def value(name: str, dtype: int, *axes: int | str) -> bytes:
    sizes = (field(2, one.encode()) if isinstance(one, str) else field(1, one) for one in axes)
    shape = b"".join(field(1, one) for one in sizes)
    return field(1, name.encode()) + field(2, field(1, field(1, dtype) + field(2, shape)))


BOUNDARY = field(INITIALIZER, tensor("keep", {})) + b"".join(
    field(number, one)
    for number, one in (
        (11, value("ids", 7, "batch", "sequence")),
        (11, value("keep", 7, 1)),
        (11, value("past", 16, "batch", 2, "past", 8)),
        (12, value("logits", 1, "batch", "sequence", 97)),
    )
)


def test_the_boundary_keeps_the_names_of_axes(folder: Path) -> None:
    inputs, outputs = onnx_boundary(write(folder, model(BOUNDARY)))
    assert inputs == (
        TensorSpec("ids", "int64", ("batch", "sequence")),
        TensorSpec("past", "bfloat16", ("batch", 2, "past", 8)),
    )
    assert outputs == (TensorSpec("logits", "float32", ("batch", "sequence", 97)),)


def test_a_cut_boundary_is_typed(folder: Path) -> None:
    raw = model(BOUNDARY)
    for length in range(3, len(raw)):
        with pytest.raises(CorruptArtifactError):
            onnx_boundary(write(folder, raw[:length]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_boundary_is_typed(folder: Path, data: st.DataObject) -> None:
    raw = bytearray(model(BOUNDARY))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        inputs, outputs = onnx_boundary(write(folder, bytes(raw)))
    except CorruptArtifactError:
        return
    assert all(isinstance(one, TensorSpec) for one in (*inputs, *outputs))


# Against the `onnx` library ----------------------------------------------------------------------


def tensors_of(message: Any) -> Iterator[Any]:
    """Every TensorProto anywhere in a message, by protobuf's own reflection."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for child in [value] if hasattr(value, "ListFields") else value:
            yield from tensors_of(child)


def test_finds_what_the_library_finds(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    np = pytest.importorskip("numpy")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weights = {f"w{i}": np.full((i + 1, 7), i, np.float32) for i in range(40)}

    def branch(name: str) -> Any:
        constant = numpy_helper.from_array(np.ones((5, 5), np.float32), f"const_{name}")
        return helper.make_graph(
            [helper.make_node("Constant", [], ["c"], value=constant)],
            name,
            [],
            [helper.make_tensor_value_info("c", 1, [5, 5])],
            [numpy_helper.from_array(np.ones((2, 9), np.float16), f"inner_{name}")],
        )

    graph = helper.make_graph(
        [helper.make_node("If", ["x"], ["y"], then_branch=branch("then"), else_branch=branch("else"))],
        "g",
        [helper.make_tensor_value_info("x", 9, [])],
        [helper.make_tensor_value_info("y", 1, [5, 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save_model(
        helper.make_model(graph),
        path,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
        convert_attribute=True,
    )
    loaded = onnx.load_model(path, load_external_data=False)
    expected = set()
    for item in tensors_of(loaded):
        if item.external_data:
            pairs = {one.key: one.value for one in item.external_data}
            expected.add((item.name, pairs["location"], int(pairs["offset"]), int(pairs["length"])))
    found = check_onnx_external_data(path)
    assert {(one.tensor, one.location, one.offset, one.length) for one in found} == expected
    assert len(expected) >= 42
