import mmap
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lmopt import mappings
from lmopt.mappings import opening, unwritten

SMAPS = """7f00-7f10 rw-p 00000000 fe:00 12   /a/model.onnx.data
Size:                  4 kB
Anonymous:             0 kB
VmFlags: rd wr mr
8000-8010 rw-p 00001000 fe:00 12   /a/model.onnx.data
Anonymous:             4 kB
9000-9010 r--p 00000000 fe:00 13   /a/other
Anonymous:             0 kB
a000-a010 rw-p 00000000 00:00 0
Anonymous:             0 kB
b000-b010 r--p 00000000 fe:00 12   /a/model.onnx.data
Anonymous:             0 kB
"""


def test_only_clean_mappings_of_the_file_are_found():
    found = [(one.start, one.end) for one in unwritten(SMAPS) if one.path == "/a/model.onnx.data"]
    assert found == [(0x7F00, 0x7F10), (0xB000, 0xB010)]


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch):
    monkeypatch.setattr(mappings, "_LARGE", 0)


def test_little_is_not_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(mappings, "_LARGE", 1000)
    looked = []
    monkeypatch.setattr(mappings, "drop_unwritten", looked.append)
    for size in (999, 1000):
        path = tmp_path / str(size)
        path.write_bytes(bytes(size))
        opening([path])()
    assert len(looked) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_go_and_come_back_as_they_were(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 4096)
    forget = opening([path])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        before = bytes(mapped)
        assert resident(path) == 1024
        forget()
        assert resident(path) == 0
        assert bytes(mapped) == before
        # What a program has written is in no file: it must stay.
        mapped[5] = 77
        forget()
        assert mapped[5] == 77


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_file_that_is_opened_again_is_left_alone(tmp_path):
    """Its first mapping may be going: its addresses may be somebody else's by the time they are dropped."""
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(bytes(1 << 20))
    forget, forget_again = opening([first, second]), opening([first])
    with (
        first.open("rb") as one,
        second.open("rb") as other,
        mmap.mmap(one.fileno(), 0, access=mmap.ACCESS_READ) as left,
        mmap.mmap(other.fileno(), 0, access=mmap.ACCESS_READ) as dropped,
    ):
        assert not any(left[:])
        assert not any(dropped[:])
        forget()
        assert (resident(first), resident(second)) == (1024, 0)
        forget_again()
        assert resident(first) == 1024


def resident(path):
    """KiB of the file's mappings that are in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    found = 0
    for line in lines:
        if line.endswith(str(path)):
            found += next(int(one.split()[1]) for one in lines if one.startswith("Rss:"))
    return found


_HOLES = """
import sys
from lmopt.mappings import return_freed
from lmopt.evaluation import resident_memory_bytes
blocks = [bytes(2000) for _ in range(30_000)]
kept = blocks[::1000]  # the heap cannot simply end earlier
del blocks
before = resident_memory_bytes()
return_freed()
print(before - resident_memory_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_freed_memory_between_what_is_in_use_goes_back() -> None:
    # In a process of its own: whatever ran here before leaves holes that are filled first.
    found = subprocess.run([sys.executable, "-c", _HOLES], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 30 << 20
