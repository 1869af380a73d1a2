"""GGUF: no count or length in the file is believed."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmopt.errors import CorruptArtifactError
from lmopt.safefiles import GgufArray, check_gguf


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join([*pairs, *tensors])
    return head + bytes(-len(head) % alignment if tensors else 0) + data


U32, F32, BOOLEAN, STRING, ARRAY = 4, 6, 7, 8, 9
GOOD = gguf(
    [
        pair("general.architecture", STRING, text("llama")),
        pair("llama.block_count", U32, struct.pack("<I", 3)),
        pair("llama.eps", F32, struct.pack("<f", 0.5)),
        pair("tokenizer.add_bos", BOOLEAN, b"\1"),
        pair("tokenizer.tokens", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text(b"\xff")),
        pair("tokenizer.scores", ARRAY, struct.pack("<IQ", F32, 2) + bytes(8)),
    ],
    [tensor("w", (32, 2), 2), tensor("b", (3,), 0, 64)],
    bytes(64 + 12),
)
ONE = [tensor("w", (8,))]


def poc_49_bytes() -> bytes:
    """The file that kills gguf 0.19.0's own reader: an array of 2**60 bytes."""
    raw = gguf([pair("k" * 0, ARRAY, struct.pack("<IQ", 0, 2**60))], counts=(0, 1))
    return raw + bytes(49 - len(raw))


REFUSED = {
    "49 bytes": poc_49_bytes(),
    "empty": b"",
    "magic only": b"GGUF",
    "other magic": b"GGML" + GOOD[4:],
    "version 1": gguf(version=1),
    "version 4": gguf(version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2**63 tensors": gguf(counts=(2**63, 0)),
    "2**64-1 pairs": gguf(counts=(0, 2**64 - 1)),
    "one pair too many": gguf(counts=(0, 1)),
    "long key": gguf([struct.pack("<Q", 2**62) + bytes(64)]),
    "long string": gguf([pair("k", STRING, struct.pack("<Q", 2**63) + bytes(64))]),
    "string to just beyond the end": gguf([pair("k", STRING, struct.pack("<Q", 9) + bytes(8))]),
    "long array": gguf([pair("k", ARRAY, struct.pack("<IQ", 10, 2**61) + bytes(64))]),
    "long array of strings": gguf([pair("k", ARRAY, struct.pack("<IQ", STRING, 2**60) + bytes(64))]),
    "array with a long string": gguf([pair("k", ARRAY, struct.pack("<IQQ", STRING, 1, 2**63) + bytes(64))]),
    "array of arrays": gguf([pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(64))]),
    "unknown type": gguf([pair("k", 13, bytes(64))]),
    "unknown element type": gguf([pair("k", ARRAY, struct.pack("<IQ", 99, 0) + bytes(64))]),
    "truth value of 2": gguf([pair("k", BOOLEAN, b"\2")]),
    "duplicate key": gguf([pair("k", U32, bytes(4)), pair("k", U32, bytes(4))]),
    "key that is not UTF-8": gguf([text(b"\xff") + struct.pack("<I", U32) + bytes(4)]),
    "duplicate tensor": gguf([], [tensor("w", (8,)), tensor("w", (8,), 0, 32)], bytes(64)),
    "five axes": gguf([], [tensor("w", (1, 1, 1, 1, 8))], bytes(32)),
    "2**32-1 axes": gguf([], [text("w") + struct.pack("<I", 2**32 - 1)], bytes(64)),
    "unknown tensor type": gguf([], [tensor("w", (8,), 4)], bytes(32)),
    "partial block": gguf([], [tensor("w", (33,), 2)], bytes(64)),
    "huge shape": gguf([], [tensor("w", (2**63, 2**63, 2**63, 2**63))], bytes(32)),
    "shape that wraps around 64 bits": gguf([], [tensor("w", (2**32, 2**32))], bytes(32)),
    "zero that hides a huge shape": gguf([], [tensor("w", (0, 2**40, 2**40))]),
    "huge offset": gguf([], [tensor("w", (8,), 0, 2**64 - 32)], bytes(32)),
    "unaligned": gguf([], [tensor("w", (8,), 0, 4)], bytes(64)),
    "overlap": gguf([], [tensor("w", (16,)), tensor("v", (16,), 0, 32)], bytes(96)),
    "same bytes twice": gguf([], [tensor("w", (8,)), tensor("v", (8,))], bytes(32)),
    "hole": gguf([], [tensor("w", (8,), 0, 64)], bytes(96)),
    "truncated": gguf([], ONE, bytes(31)),
    "trailing bytes": gguf([], ONE, bytes(64)),
    "appended zip": gguf([], ONE, bytes(32)) + b"PK\3\4" + bytes(60),
    "bytes after a header without tensors": gguf([pair("k", U32, bytes(4))]) + bytes(100),
    "alignment 0": gguf([pair("general.alignment", U32, bytes(4))], ONE, bytes(32)),
    "alignment 3": gguf([pair("general.alignment", U32, struct.pack("<I", 3))], ONE, bytes(32)),
    "alignment 2**31": gguf([pair("general.alignment", U32, struct.pack("<I", 2**31))], ONE, bytes(32)),
    "alignment as text": gguf([pair("general.alignment", STRING, text("32"))], ONE, bytes(32)),
}


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "x.gguf"
    path.write_bytes(raw)
    return path


@pytest.mark.timeout(20)
@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(CorruptArtifactError, match=r"x\.gguf"):
        check_gguf(write(tmp_path, raw))


def test_good(tmp_path: Path) -> None:
    header = check_gguf(write(tmp_path, GOOD))
    assert header.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.eps": 0.5,
        "tokenizer.add_bos": True,
        "tokenizer.tokens": GgufArray(STRING, 2),
        "tokenizer.scores": GgufArray(F32, 2),
    }
    assert (header.tensors["w"].bytes, header.tensors["w"].shape) == (36, (32, 2))
    assert header.data_offset % 32 == 0
    assert header.data_offset + 64 + 12 == len(GOOD)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(CorruptArtifactError):
            check_gguf(write(tmp_path, GOOD[:length]))


VALUES = st.integers(0, 2**64 - 1)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(GOOD) - 9), st.sampled_from(["<B", "<I", "<Q"]), st.integers(0, 2**64 - 1)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_damage_gives_a_header_or_a_typed_error(tmp_path: Path, edits: list[tuple[int, str, int]]) -> None:
    raw = bytearray(GOOD)
    for position, form, value in edits:
        size = struct.calcsize(form)
        struct.pack_into(form, raw, position, value % 256**size)
    try:
        header = check_gguf(write(tmp_path, bytes(raw)))
    except CorruptArtifactError:
        return
    for one in header.tensors.values():
        assert header.data_offset + one.offset + one.bytes <= len(raw)


def test_what_the_reference_writer_writes(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    writer = library.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_context_length(2048)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("w", np.zeros((4, 32), np.float32))
    blocks = library.quantize(np.ones((4, 64), np.float32), library.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", blocks, raw_dtype=library.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = check_gguf(tmp_path / "w.gguf")
    assert header.metadata["llama.context_length"] == 2048
    assert header.tensors["q"].shape == (64, 4)
    assert header.tensors["q"].bytes == blocks.nbytes


@pytest.mark.parametrize("missing_type", [36, 37, 38])
def test_types_that_were_withdrawn_are_refused(tmp_path: Path, missing_type: int) -> None:
    with pytest.raises(CorruptArtifactError, match="unknown type"):
        check_gguf(write(tmp_path, gguf([], [tensor("w", (256,), missing_type)], bytes(1024))))


def test_block_sizes_are_those_of_the_library() -> None:
    library = pytest.importorskip("gguf")
    from lmopt.safefiles.gguf import BLOCKS

    sizes = {int(kind): tuple(size) for kind, size in library.GGML_QUANT_SIZES.items()}
    assert {kind: sizes[kind] for kind in BLOCKS if kind in sizes} == {
        kind: size for kind, size in BLOCKS.items() if kind in sizes
    }
    assert not sizes.keys() - BLOCKS.keys()


@pytest.mark.real_model
def test_real_file(smollm2_gguf: Path) -> None:
    header = check_gguf(smollm2_gguf)
    assert header.metadata["general.architecture"] == "llama"
    assert len(header.tensors) == 272
