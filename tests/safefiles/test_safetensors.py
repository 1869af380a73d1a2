"""safetensors: what the reference reader refuses we refuse, and duplicate keys as well."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from lmopt.errors import ArtifactError, ArtifactNotFoundError, CorruptArtifactError, UnsafeArtifactError
from lmopt.safefiles import check_safetensors, check_shard_index


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = pack({"a": entry(0, 4), "b": entry(4, 8, [1], "F32")}, bytes(8))
A = json.dumps(entry(0, 4)).encode()

REFUSED = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header longer than the file": pack(b"{}", length=3),
    "header of 2**63": pack(b"{}", length=2**63),
    "header of 2**64-1": pack(b"{}", length=2**64 - 1),
    "header that is a list": pack(b"[]"),
    "header with leading blank": pack(b" {}"),
    "cut-off JSON": pack(b'{"a":'),
    "deep JSON": pack(b'{"a":' * 100_000),
    "duplicate tensor": pack(b'{"a":' + A + b',"a":' + A + b"}", bytes(4)),
    "duplicate field": pack(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
    "duplicate metadata": pack(b'{"__metadata__":{"x":"1","x":"2"}}'),
    "metadata that is no text": pack({"__metadata__": {"x": 1}}),
    "metadata that is a list": pack({"__metadata__": []}),
    "hole": pack({"a": entry(0, 4), "b": entry(5, 8)}, bytes(8)),
    "hole at the start": pack({"a": entry(1, 4)}, bytes(4)),
    "overlap": pack({"a": entry(0, 4), "b": entry(2, 8)}, bytes(8)),
    "same bytes twice": pack({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "trailing bytes": pack({"a": entry(0, 4)}, bytes(5)),
    "appended zip": GOOD + b"PK\x03\x04" + bytes(60),
    "truncated": GOOD[:-1],
    "lying shape": pack({"a": entry(0, 4, [5])}, bytes(4)),
    "lying dtype": pack({"a": entry(0, 4, [4], "F32")}, bytes(4)),
    "overflowing shape": pack({"a": entry(0, 0, [2**62, 2**62, 0])}),
    "shape over 64 bits": pack({"a": entry(0, 4, [2**64])}, bytes(4)),
    "negative shape": pack({"a": entry(0, 4, [-2, -2])}, bytes(4)),
    "end before begin": pack({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, bytes(4)),
    "truth value as size": pack({"a": entry(0, 1, [True])}, bytes(1)),
    "fraction as size": pack({"a": entry(0, 4, [4.0])}, bytes(4)),
    "three offsets": pack({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, bytes(4)),
    "unknown dtype": pack({"a": entry(0, 4, [4], "Q8")}, bytes(4)),
    "dtype that is a list": pack({"a": entry(0, 4, [4], ["U8"])}, bytes(4)),
    "missing field": pack({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    "unknown field": pack({"a": {**entry(0, 4), "code": "x"}}, bytes(4)),
    "half a byte": pack({"a": entry(0, 1, [1], "F4")}, bytes(1)),
    "pickle": b"\x80\x04\x95" + bytes(60),
}
# Where the reference reader (0.8.0) is laxer than its own specification.
LAX = {
    "duplicate tensor",
    "duplicate field",
    "duplicate metadata",
    "unknown field",
    "header with leading blank",
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CorruptArtifactError, match=r"bad\.safetensors"):
        check_safetensors(path)


def test_good(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    header = check_safetensors(path)
    assert header.tensors["b"].dtype == "F32"
    assert header.tensors["b"].shape == (1,)
    assert (header.tensors["b"].begin, header.tensors["b"].end) == (4, 8)


def test_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {
        "scalar": np.array(1, np.float32),
        "empty": np.zeros((0, 3), np.float16),
        "ünïcode": np.zeros((2, 3), np.int64),
        "bool": np.ones(3, bool),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    header = check_safetensors(tmp_path / "x.safetensors")
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: array.shape for name, array in arrays.items()
    }
    assert header.metadata == {"format": "np"}


def reference_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            list(file.keys())
    except SafetensorError:
        return False
    return True


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_agrees_with_the_reference_reader_on_damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(save({"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.int16)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(0, 3))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.sampled_from(b'0123456789"{}[],:FIU \x00\xff'))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    try:
        check_safetensors(path)
    except CorruptArtifactError as error:
        refusal = str(error)
    else:
        refusal = ""
    stricter = "twice" in refusal or "exactly" in refusal
    assert stricter or reference_accepts(path) is not bool(refusal)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - LAX))
def test_the_reference_reader_refuses_the_same_table(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(REFUSED[name])
    assert not reference_accepts(path)


# Shard index ------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.zeros(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    save_file({"a": np.zeros(3)}, tmp_path / "outside.safetensors")
    return folder


def write_index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards(sharded: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = write_index(sharded, {"a": names[0], "b": names[1]})
    assert check_shard_index(index) == tuple(sharded / name for name in names)


SHARD_ATTACKS = {
    "parent": ("../outside.safetensors", UnsafeArtifactError),
    "nested parent": ("x/../../outside.safetensors", UnsafeArtifactError),
    "absolute": ("/etc/passwd.safetensors", UnsafeArtifactError),
    "link": ("link.safetensors", UnsafeArtifactError),
    "pickle": ("model.bin", CorruptArtifactError),
    "number": (1, CorruptArtifactError),
    "missing": ("model-00003-of-00002.safetensors", ArtifactNotFoundError),
    "shard without the tensor": ("model-00002-of-00002.safetensors", CorruptArtifactError),
    "damaged shard": ("damaged.safetensors", CorruptArtifactError),
}


@pytest.mark.parametrize(("shard", "error"), SHARD_ATTACKS.values(), ids=SHARD_ATTACKS)
def test_shard_attacks(sharded: Path, shard: Any, error: type[ArtifactError]) -> None:
    (sharded / "link.safetensors").symlink_to("../outside.safetensors")
    (sharded / "damaged.safetensors").write_bytes(GOOD[:-1])
    with pytest.raises(error):
        check_shard_index(write_index(sharded, {"a": shard}))


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_malformed_index(sharded: Path, weight_map: Any) -> None:
    with pytest.raises(CorruptArtifactError, match="weight_map"):
        check_shard_index(write_index(sharded, weight_map))


def test_duplicate_key_in_index(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CorruptArtifactError, match="twice"):
        check_shard_index(path)
