import mmap
import os
import subprocess
import sys

import pytest

from lmopt.evaluation import memory
from lmopt.evaluation.memory import PeakMemory, folder_size_bytes

MB = 1 << 20


def touch(megabytes):
    # Not from the heap: what earlier tests gave back to it may be resident already.
    with mmap.mmap(-1, megabytes * MB) as block:
        for page in range(0, megabytes * MB, mmap.PAGESIZE):
            block[page] = 1


@pytest.mark.parametrize("kernel", [True, False])
def test_a_passing_peak_is_seen(monkeypatch, kernel):
    if not kernel:
        monkeypatch.setattr(memory, "reset_peak", lambda: False)
    with PeakMemory(interval_s=0.001) as peak:
        for _ in range(1 if peak.exact else 20):
            touch(200)
    if kernel and sys.platform == "linux" and memory.reset_peak():
        assert peak.exact
    if not kernel:
        assert not peak.exact
    assert 150 * MB < peak.added_bytes < 400 * MB
    assert peak.peak_bytes >= peak.before_bytes


def test_a_peak_before_the_block_does_not_count():
    if not memory.reset_peak():
        pytest.skip("this container forbids resetting the peak")
    touch(300)
    with PeakMemory() as peak:
        touch(20)
    assert peak.added_bytes < 150 * MB


def test_an_inner_block_does_not_take_the_outer_peak():
    with PeakMemory() as outer:
        touch(200)
        with PeakMemory() as inner:
            touch(20)
    if outer.exact:
        assert inner.added_bytes < 120 * MB
        assert outer.added_bytes > 150 * MB


def test_the_peak_is_fixed_when_the_block_fails():
    with pytest.raises(KeyError), PeakMemory() as peak:
        raise KeyError
    assert peak.peak_bytes > 0
    assert not memory._active


def test_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESSES", tmp_path / "none")
    assert not memory.reset_peak()
    assert memory.peak_memory_bytes() > 10 * MB
    assert memory.resident_memory_bytes() == memory.peak_memory_bytes()
    assert memory.peak_memory_bytes(os.getpid()) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="another process's memory is known on Linux only")
def test_the_peak_of_another_process():
    # It speaks only after the memory is given back.
    program = "import sys; x = b'x' * 100_000_000; del x; print('ready', flush=True); sys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        assert memory.peak_memory_bytes(other.pid) > 100_000_000
        if memory.reset_peak(other.pid):
            assert memory.peak_memory_bytes(other.pid) < 90_000_000
        other.communicate("\n")


def test_folder_size(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"x" * 11)
    os.link(tmp_path / "a", tmp_path / "again")
    assert folder_size_bytes(tmp_path) == 111
    assert folder_size_bytes(tmp_path / "a") == 100
