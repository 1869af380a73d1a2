"""JSON that two readers could understand differently is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmopt.errors import CorruptArtifactError
from lmopt.safefiles import parse_json, read_json

REFUSED = {
    "duplicate key": b'{"a": 1, "a": 2}',
    "duplicate key inside": b'[{"b": {"a": 1, "a": 1}}]',
    "duplicate key by escape": b'{"a": 1, "\\u0061": 2}',
    "NaN": b"[NaN]",
    "infinity": b"[-Infinity]",
    "overflow": b"[1e999]",
    "trailing text": b"{} {}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b'"\xff"',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "huge number": b"1" * 10_000,
    "empty": b"",
    "cut off": b'{"a": [1, 2',
    "control character": b'"\x01"',
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_refused(raw: bytes) -> None:
    with pytest.raises(CorruptArtifactError, match="some-file"):
        parse_json(raw, "some-file")


def test_many_duplicates_are_refused_quickly() -> None:
    raw = b"{" + b",".join(b'"k%d": 1' % (i % 150_000) for i in range(300_000)) + b"}"
    with pytest.raises(CorruptArtifactError, match="twice"):
        parse_json(raw, "some-file")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_plain_json_is_read_as_the_standard_library_reads_it(value: object) -> None:
    raw = json.dumps(value).encode()
    assert parse_json(raw, "x") == json.loads(raw)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_a_typed_error(raw: bytes) -> None:
    try:
        parse_json(raw, "x")
    except CorruptArtifactError:
        return
    json.loads(raw)


def test_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    path.write_bytes(b"[" + b" " * 100 + b"]")
    assert read_json(path, limit=102) == []
    with pytest.raises(CorruptArtifactError, match="102 bytes"):
        read_json(path, limit=101)
