"""The manifest has one spelling, and a changed bit in it is noticed."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmopt.artifact import manifest
from lmopt.errors import ArtifactError, CorruptArtifactError
from lmopt.types import ModelFacts

GOOD: dict[str, Any] = {
    **{field: {} for field in manifest.CONTENT},
    "created_by": "lmopt test",
    "files": {"model.onnx": {"bytes": 3, "sha256": "0" * 64}},
    "schema": 1,
}


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "lmopt.json"
    path.write_bytes(raw)
    return path


def test_round_trip(tmp_path: Path) -> None:
    found = manifest.read_manifest(write(tmp_path, manifest.render(GOOD)))
    seal = found.pop("sha256")
    assert len(seal) == 64
    assert found == GOOD


def test_every_bit_flip_is_noticed(tmp_path: Path) -> None:
    raw = manifest.render(GOOD)
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CorruptArtifactError, match=r"lmopt\.json"):
            manifest.read_manifest(write(tmp_path, bytes(damaged)))


def resealed(**changes: Any) -> bytes:
    return manifest.render({key: value for key, value in {**GOOD, **changes}.items() if value is not None})


RAW = manifest.render(GOOD)
REFUSED = {
    "empty": b"",
    "truncated": RAW[:-2],
    "last newline missing": RAW[:-1],
    "other spelling of the same": json.dumps(json.loads(RAW)).encode(),
    "list": b"[]",
    "duplicate key": RAW.replace(b'"schema": 1', b'"schema": 1,\n  "schema": 1'),
    "NaN": RAW.replace(b'"schema": 1', b'"schema": NaN'),
    "deep": b'{"a":' * 100_000,
    "no seal": json.dumps(GOOD, sort_keys=True, indent=2).encode() + b"\n",
    "edited": RAW.replace(b"model.onnx", b"other.onnx"),
    "newer schema": resealed(schema=2),
    "schema that is text": resealed(schema="1"),
    "no schema": resealed(schema=None),
    "no files": resealed(files=None),
    "files that are a list": resealed(files=[]),
    "no formats": resealed(formats=None),
    "no creator": resealed(created_by=None),
    "entry without a hash": resealed(files={"a": {"bytes": 1}}),
    "entry with more": resealed(files={"a": {"bytes": 1, "sha256": "0" * 64, "url": "x"}}),
    "size that is a truth value": resealed(files={"a": {"bytes": True, "sha256": "0" * 64}}),
    "hash in capitals": resealed(files={"a": {"bytes": 1, "sha256": "A" * 64}}),
    "short hash": resealed(files={"a": {"bytes": 1, "sha256": "0" * 63}}),
}
NAMES = [
    "", "..", "../x", "a/../x", "/x", "//x", "a//x", "./x", "a/./x", "a/", "a\\x", "C:x", "x\0", "x\n",
    "x\x7f", "\u202e", "lmopt.json",
]  # fmt: skip


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(CorruptArtifactError, match=r"lmopt\.json"):
        manifest.read_manifest(write(tmp_path, raw))


@pytest.mark.parametrize("name", NAMES)
def test_refused_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptArtifactError):
        manifest.read_manifest(write(tmp_path, resealed(files={name: {"bytes": 1, "sha256": "0" * 64}})))


def test_plain_data() -> None:
    @dataclasses.dataclass
    class Nested:
        facts: ModelFacts
        sizes: tuple[int, ...]

    given_value = {
        "b": Nested(ModelFacts(3), (1, 2)),
        "a": [np.float32(0.5), np.int64(7), np.bool_(True), None],
    }
    assert manifest.plain(given_value, "x") == {
        "a": [0.5, 7, True, None],
        "b": {
            "facts": {
                "vocab_size": 3,
                "context_length": None,
                "parameters": 0,
                "architecture": "",
                "source": None,
            },
            "sizes": [1, 2],
        },
    }


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, {1: 2}, {1, 2}, Path("/x"), b"x", object(), np.zeros(2)]
)
def test_what_has_no_place_is_named(value: Any) -> None:
    with pytest.raises(ArtifactError, match=r"parity\.deep\[0\]"):
        manifest.plain({"deep": [value]}, "parity")


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), plain_values, max_size=4))
def test_any_plain_content_survives(content: dict[str, Any]) -> None:
    raw = manifest.render({**GOOD, "measurements": content})
    assert json.loads(raw)["measurements"] == content
    shuffled = dict(reversed(list(content.items())))
    assert manifest.render({**GOOD, "measurements": shuffled}) == raw


@settings(max_examples=200, deadline=None)
@given(plain_values, plain_values)
def test_keys_are_equal_exactly_when_values_are(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (manifest.canonical(one, "x") == manifest.canonical(other, "x")) is same
