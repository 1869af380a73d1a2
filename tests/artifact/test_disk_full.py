"""A full disk is a typed error with numbers, and leaves the disk as it was."""

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmopt.artifact import Artifact, publish, require_space
from lmopt.artifact.space import means_full
from lmopt.errors import ArtifactError, DiskFullError

KIB = 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs may not be mounted here (needs root)")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def numbers(error: DiskFullError) -> tuple[int, int]:
    needed, free = re.search(r"(\d+) bytes are needed, (\d+) are free", str(error)).groups()
    return int(needed), int(free)


def fill(folder: Path, size: int) -> None:
    with open(folder / "weights.bin", "wb", buffering=0) as file:
        for _ in range(size // KIB):
            written = file.write(os.urandom(KIB))
            if written < KIB:
                file.write(b"x" * (KIB - written))


@pytest.mark.parametrize("size", [500 * KIB, 700 * KIB, 740 * KIB, 900 * KIB, 2000 * KIB])
def test_small_disk(small_disk: Path, size: int) -> None:
    target = small_disk / "artefact"
    with publish(target) as draft:
        fill(draft.path, 300 * KIB)
    free = shutil.disk_usage(small_disk).free
    try:
        with publish(target, overwrite=True) as draft:
            fill(draft.path, size)
    except DiskFullError as error:
        needed, left = numbers(error)
        assert needed > left
        assert size >= 700 * KIB
        assert shutil.disk_usage(small_disk).free == free
        assert Artifact.open(target).manifest["files"]["weights.bin"]["bytes"] == 300 * KIB
    else:
        assert Artifact.open(target).manifest["files"]["weights.bin"]["bytes"] == size
        assert size <= 700 * KIB
    assert os.listdir(small_disk) == ["artefact"]


def test_native_writers_on_a_small_disk(small_disk: Path) -> None:
    with pytest.raises(DiskFullError), publish(small_disk / "artefact") as draft:
        save_file({"a": np.zeros(2000 * KIB, np.uint8)}, draft.path / "model.safetensors")
    assert os.listdir(small_disk) == []


def test_a_writer_that_says_nothing_on_a_small_disk(small_disk: Path) -> None:
    save_file({"a": np.ones(1100 * KIB, np.uint8)}, small_disk.parent / "whole.safetensors")
    raw = (small_disk.parent / "whole.safetensors").read_bytes()

    def write_what_fits(path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        assert os.write(descriptor, raw) < len(raw)
        os.close(descriptor)

    with pytest.raises(DiskFullError), publish(small_disk / "artefact") as draft:
        write_what_fits(draft.path / "model.safetensors")
    assert os.listdir(small_disk) == []


def test_known_need_is_refused_before_anything_is_written(small_disk: Path) -> None:
    with pytest.raises(DiskFullError) as caught, publish(small_disk / "new" / "a", needed=2**21):
        pytest.fail("the block must not be entered")
    assert numbers(caught.value) == (2**21, shutil.disk_usage(small_disk).free)
    assert os.listdir(small_disk) == []


def test_require_space(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OSError, match="free") as caught:
        require_space(tmp_path / "not" / "yet", 2**62)
    assert isinstance(caught.value, DiskFullError)
    assert os.listdir(tmp_path) == []


def test_file_size_limit(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * KIB, hard))
    try:
        with pytest.raises(DiskFullError), publish(tmp_path / "artefact") as draft:
            fill(draft.path, 200 * KIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_full_in_other_words() -> None:
    wrapped = RuntimeError("cannot serialise")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert means_full(wrapped)
    assert means_full(OSError(122, "in another language"))
    assert means_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not means_full(RuntimeError("shape mismatch"))
    assert not means_full(OSError(5, "Input/output error"))


CHILD = """
import sys
from lmopt.artifact import publish
from lmopt.errors import LmoptError
try:
    with publish(sys.argv[1], overwrite=True) as draft:
        (draft.path / "b.txt").write_text("new")
except LmoptError as error:
    print(type(error).__name__)
else:
    print("published")
"""
FAULTS = [
    ("write", "ENOSPC", 1, DiskFullError),
    ("write", "EDQUOT", 1, DiskFullError),
    ("write", "ENOSPC", 2, DiskFullError),
    ("write", "EIO", 2, ArtifactError),
    ("fsync", "ENOSPC", 1, DiskFullError),
    ("fsync", "EDQUOT", 2, DiskFullError),
    ("fsync", "EIO", 1, ArtifactError),
    ("fsync", "EIO", 3, ArtifactError),
    ("fsync", "EIO", 4, ArtifactError),
    ("mkdir", "ENOSPC", 1, DiskFullError),
    ("mkdir", "EROFS", 1, ArtifactError),
    ("renameat2", "ENOSPC", 1, DiskFullError),
    ("renameat2", "EACCES", 1, ArtifactError),
]


@pytest.mark.parametrize(("call", "fault", "count", "error"), FAULTS)
def test_injected_faults(tmp_path: Path, strace, call: str, fault: str, count: int, error: type) -> None:
    target = tmp_path / "place" / "artefact"
    with publish(target) as draft:
        (draft.path / "b.txt").write_text("old")
    done = strace(
        ["-e", f"trace={call}", "-e", f"inject={call}:error={fault}:when={count}"], CHILD, str(target)
    )
    assert "INJECTED" in done.stdout
    assert done.args.strip() == error.__name__, done.stderr
    assert os.listdir(target.parent) == ["artefact"]
    assert Artifact.open(target).file("b.txt").read_text() == "old"


@pytest.mark.parametrize("fault", ["ENOSYS", "EINVAL"])
def test_without_exchange(tmp_path: Path, strace, fault: str) -> None:
    target = tmp_path / "place" / "artefact"
    with publish(target) as draft:
        (draft.path / "b.txt").write_text("old")
    done = strace(["-e", "trace=renameat2", "-e", f"inject=renameat2:error={fault}"], CHILD, str(target))
    assert done.args.strip() == "published", done.stderr
    assert os.listdir(target.parent) == ["artefact"]
    assert Artifact.open(target).file("b.txt").read_text() == "new"
