"""A small hostile file may not take much memory: each is read in a child that cannot have it."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHILD = """
import resource, sys
import lmopt.safefiles
from lmopt.errors import ArtifactError
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    getattr(lmopt.safefiles, sys.argv[1])(sys.argv[2])
except ArtifactError as error:
    print(type(error).__name__, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def gguf_of_49_bytes() -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 0) + struct.pack("<IIQ", 9, 0, 2**60)
    return head + bytes(49 - len(head))


def gguf_of_empty_strings() -> bytes:
    count = 2_100_000
    pair = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, count)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair + bytes(8 * count)


def safetensors_of_many_tensors() -> bytes:
    entry = b'"%07x":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    raw = b"{" + b",".join(entry % (i, i, i + 1) for i in range(210_000)) + b"}"
    return len(raw).to_bytes(8, "little") + raw + bytes(210_000)


def safetensors_of_empty_lists() -> bytes:
    raw = b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"
    return len(raw).to_bytes(8, "little") + raw


def onnx_of_empty_nodes() -> bytes:
    nodes = b"\x0a\x00" * 1_600_000
    return b"\x3a" + bytes([len(nodes) & 127 | 128, len(nodes) >> 7 & 127 | 128, len(nodes) >> 14 & 127 | 128,
                            len(nodes) >> 21]) + nodes  # fmt: skip


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "GGUF of 49 bytes": ("check_gguf", gguf_of_49_bytes),
    "GGUF of empty strings": ("check_gguf", gguf_of_empty_strings),
    "safetensors of many tensors": ("check_safetensors", safetensors_of_many_tensors),
    "safetensors of empty lists": ("check_safetensors", safetensors_of_empty_lists),
    "ONNX of empty nodes": ("check_onnx_external_data", onnx_of_empty_nodes),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("reader", "make"), BOMBS.values(), ids=BOMBS)
def test_bombs(tmp_path: Path, reader: str, make: Callable[[], bytes]) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(make())
    command = [sys.executable, "-c", CHILD, reader, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    name, kibibytes = done.stdout.split()
    assert name == "CorruptArtifactError"
    assert int(kibibytes) * 1024 <= 64 * 2**20 + 2 * path.stat().st_size
