"""Giving memory back leaves every value as it is."""

import mmap
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lmopt import mappings
from lmopt.backends.torch import pages
from lmopt.backends.torch.pages import give_back
from lmopt.evaluation import resident_memory_bytes

SIZE = 64 * 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="mapped pages are given back on Linux only")


class Weights(nn.Module):
    """A module whose one weight is a mapped file, as transformers maps safetensors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=SIZE)
        self.weight = nn.Parameter(torch.tensor([], dtype=torch.uint8).set_(storage), requires_grad=False)

    def total(self) -> int:
        return int(self.weight.sum(dtype=torch.int64))


@pytest.fixture
def module(tmp_path: Path) -> Weights:
    path = tmp_path / "weights"
    path.write_bytes(bytes([7]) * SIZE)
    return Weights(path)


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_LARGE", 0)


@linux
def test_little_is_not_looked_for(module: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_LARGE", SIZE + 1)
    monkeypatch.setattr(pages, "drop_unwritten", lambda wanted: pytest.fail("looked at what is mapped"))
    assert give_back(module) == 0
    monkeypatch.setattr(pages, "_LARGE", SIZE)
    with pytest.raises(pytest.fail.Exception, match="looked"):
        give_back(module)


def all_else() -> None:
    """Give back what is not the module's: code, and what the allocator keeps."""
    give_back(nn.Linear(2, 2))


@linux
def test_mapped_weights_leave_memory_and_come_back(module: Weights) -> None:
    all_else()
    assert module.total() == 7 * SIZE
    before = resident_memory_bytes()
    assert give_back(module) >= SIZE
    assert resident_memory_bytes() < before - SIZE // 2
    assert module.total() == 7 * SIZE


@linux
@pytest.mark.parametrize("at", [0, SIZE // 2, SIZE - 1])
def test_weights_that_were_written_to_are_kept(module: Weights, at: int) -> None:
    all_else()
    assert module.total() == 7 * SIZE
    module.weight[at] = 9
    assert give_back(module) < SIZE
    assert module.weight[at] == 9
    assert module.total() == 7 * SIZE + 2


@linux
def test_writable_mappings_of_others_are_left_alone(module: Weights) -> None:
    all_else()
    assert module.total() == 7 * SIZE
    assert give_back(nn.Linear(2, 2)) < SIZE


@linux
def test_mappings_that_others_may_unmap_are_left_alone(tmp_path: Path) -> None:
    """Where another thread unmaps a file, the same addresses may hold its memory a moment later."""
    path = tmp_path / "data"
    path.write_bytes(bytes([7]) * SIZE)
    all_else()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[::4096].count(7) == SIZE // 4096
        assert give_back(nn.Linear(2, 2)) < SIZE


def test_weights_in_memory_of_their_own_stay() -> None:
    linear = nn.Linear(512, 512)
    kept = {name: value.clone() for name, value in linear.state_dict().items()}
    give_back(linear)
    assert all(torch.equal(value, kept[name]) for name, value in linear.state_dict().items())


@pytest.mark.parametrize("reason", ["another system", "nothing is told"])
def test_where_the_system_does_not_tell_nothing_is_done(
    module: Weights, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    if reason == "another system":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(mappings, "_MAPS", Path(os.devnull) / "none")
    assert give_back(module) == 0
    assert module.total() == 7 * SIZE
