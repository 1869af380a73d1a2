"""An artefact appears whole or not at all, the same bytes every time."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lmopt.artifact import MANIFEST, Artifact, durable, publish, staging
from lmopt.errors import ArtifactError, ArtifactExistsError, CorruptArtifactError


def write(target: Path, text: str = "one", **options: Any) -> None:
    with publish(target, **options) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "a.txt").write_text(text)


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def test_parents_are_made_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "x" / "y" / "artefact")
    assert Artifact.open(tmp_path / "x" / "y" / "artefact").file("sub/a.txt").read_text() == "one"
    assert entries(tmp_path) == ["x"]
    assert entries(tmp_path / "x" / "y") == ["artefact"]


def test_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("artefact"))
    Artifact.open("artefact")


def fail(target: Path, error: BaseException, **options: Any) -> None:
    with publish(target, **options) as draft:
        (draft.path / "a").write_text("x")
        assert not (target / "a").exists()
        raise error


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail(tmp_path / "artefact", error)
    assert entries(tmp_path) == []


def test_the_old_one_stays_after_an_exception(tmp_path: Path) -> None:
    write(tmp_path / "artefact")
    with pytest.raises(RuntimeError):
        fail(tmp_path / "artefact", RuntimeError("x"), overwrite=True)
    assert entries(tmp_path) == ["artefact"]
    assert Artifact.open(tmp_path / "artefact").file("sub/a.txt").read_text() == "one"


def test_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "artefact")
    with pytest.raises(ArtifactExistsError, match="overwrite=True"):
        write(tmp_path / "artefact", "two")
    write(tmp_path / "artefact", "two", overwrite=True)
    assert Artifact.open(tmp_path / "artefact").file("sub/a.txt").read_text() == "two"
    assert entries(tmp_path) == ["artefact"]


def test_a_damaged_artefact_may_be_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "artefact")
    (tmp_path / "artefact" / "sub" / "a.txt").write_text("damaged")
    write(tmp_path / "artefact", "two", overwrite=True)
    Artifact.open(tmp_path / "artefact")


STRANGERS = {
    "file": lambda path: path.write_text("mine"),
    "folder with a file": lambda path: (path.mkdir(), (path / "mine").write_text("x")),
    "artefact with a file of the user": lambda path: (write(path), (path / "mine").write_text("x")),
    "artefact with a git repository": lambda path: (write(path), (path / ".git").mkdir()),
    "artefact with a damaged manifest": lambda path: (write(path), (path / MANIFEST).write_text("{}")),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", STRANGERS.values(), ids=STRANGERS)
def test_what_lmopt_did_not_write_is_never_replaced(tmp_path: Path, make: Any, overwrite: bool) -> None:
    target = tmp_path / "artefact"
    make(target)
    before = [(path, path.is_file() and path.read_bytes()) for path in sorted(target.rglob("*"))]
    with pytest.raises(ArtifactExistsError, match="artefact"):
        write(target, overwrite=overwrite)
    assert [(path, path.is_file() and path.read_bytes()) for path in sorted(target.rglob("*"))] == before
    assert entries(tmp_path) == ["artefact"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "artefact").mkdir()
    write(tmp_path / "artefact")
    Artifact.open(tmp_path / "artefact")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    target = tmp_path / "artefact"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine").write_text("x")
    with pytest.raises(ArtifactExistsError), publish(target, overwrite=overwrite):
        shutil.copytree(tmp_path / "mine", target)
    shutil.rmtree(tmp_path / "mine")
    assert (target / "mine").read_text() == "x"
    assert entries(tmp_path) == ["artefact"]


def test_a_linked_target_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "artefact")
    write(tmp_path / "link")
    write(tmp_path / "link", "two", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert Artifact.open(tmp_path / "link").path == tmp_path / "disk" / "artefact"


@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(tmp_path: Path, mask: int, file_mode: int, folder_mode: int) -> None:
    with umask(mask), publish(tmp_path / "artefact") as draft:
        (draft.path / "sub").mkdir(mode=0o700)
        # save_file of safetensors leaves 0600, whatever the umask.
        save_file({"a": np.zeros(3)}, draft.path / "sub" / "model.safetensors")
        (draft.path / "run.sh").touch(mode=0o777)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "artefact").rglob("*")}
    assert found == {
        "sub": folder_mode,
        "model.safetensors": file_mode,
        "run.sh": file_mode,
        MANIFEST: file_mode,
    }
    assert stat.S_IMODE((tmp_path / "artefact").stat().st_mode) == folder_mode


LINKS = {
    "symbolic link": lambda path: (path / "x").symlink_to("/etc/passwd"),
    "dangling link": lambda path: (path / "x").symlink_to("nothing"),
    "linked folder": lambda path: (path / "x").symlink_to("/etc"),
    "hard link": lambda path: ((path / "y").touch(), (path / "x").hardlink_to(path / "y")),
    "pipe": lambda path: os.mkfifo(path / "x"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)
def test_links_are_refused(tmp_path: Path, make: Any) -> None:
    with pytest.raises(ArtifactError, match="copies only"), publish(tmp_path / "artefact") as draft:
        make(draft.path)
    assert entries(tmp_path) == []


@pytest.mark.parametrize("name", ["a\\b", "a:b", "a\n", MANIFEST, os.fsdecode(b"\xff")])
def test_names_that_do_not_travel_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError), publish(tmp_path / "artefact") as draft:
        (draft.path / name).write_text("x")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("field", ["files", "sha256", "schema", "created_by", "formatz"])
def test_manifest_fields(tmp_path: Path, field: str) -> None:
    with pytest.raises(ArtifactError, match=field), publish(tmp_path / "artefact") as draft:
        draft.manifest[field] = {}
    with pytest.raises(ArtifactError, match=r"parity\.kl"), publish(tmp_path / "artefact") as draft:
        draft.manifest["parity"]["kl"] = float("nan")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model.onnx"])
def test_a_file_left_short_is_not_published(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptArtifactError, match=name), publish(tmp_path / "artefact") as draft:
        (draft.path / name).write_bytes(b"\x3a\x7f" + b"GGUF")
    assert entries(tmp_path) == []


CHILD = """
import sys
from lmopt.artifact import publish
names = {"one", "two", "three", "four"}  # their order follows PYTHONHASHSEED
with publish(sys.argv[1]) as draft:
    for name in names:
        (draft.path / name).write_text(name)
        draft.manifest["versions"][name] = 1.5
"""


def test_two_builds_have_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for number in range(3):
        target = tmp_path / str(number) / f"artefact-{number}"
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-c", CHILD, str(target)], check=True, env=environment)
        found.append({path.name: path.read_bytes() for path in target.iterdir()})
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 5


# What a killed process left ----------------------------------------------------------------------


def test_a_dead_owners_folder_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    target = tmp_path / "artefact"
    dead = tmp_path / ".artefact.tmp-1-00000000"  # process 1 lives: an id in a name proves nothing
    other = tmp_path / ".other.tmp-999999-00000000"
    unrelated = tmp_path / ".artefact.tmp-mine"
    for folder in (dead, other, unrelated):
        folder.mkdir()
        (folder / "half").write_text("x")
    with publish(target) as living:
        assert not dead.exists()
        write(target)
        assert living.path.is_dir()
        (living.path / "a").write_text("x")
        Path(target, "sub", "a.txt").unlink()
        Path(target, "sub").rmdir()
        Path(target, MANIFEST).unlink()
    assert entries(tmp_path) == [".artefact.tmp-mine", ".other.tmp-999999-00000000", "artefact"]
    staging.sweep(tmp_path)
    assert entries(tmp_path) == [".artefact.tmp-mine", "artefact"]


def test_long_names(tmp_path: Path) -> None:
    target = tmp_path / ("ü" * 127)
    write(target)
    write(target, "two", overwrite=True)
    assert entries(tmp_path) == [target.name]


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot swap two folders."""
    monkeypatch.setattr(durable, "exchange", lambda one, other: False)


@pytest.mark.usefixtures("no_exchange")
def test_overwrite_without_exchange(tmp_path: Path) -> None:
    write(tmp_path / "artefact")
    write(tmp_path / "artefact", "two", overwrite=True)
    assert entries(tmp_path) == ["artefact"]
    assert Artifact.open(tmp_path / "artefact").file("sub/a.txt").read_text() == "two"


def test_an_old_artefact_moved_aside_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "artefact"
    write(target)
    # As a kill between the two renames of a file system without exchange leaves it.
    os.rename(target, tmp_path / ".artefact.old-999999-00000000")
    (tmp_path / ".artefact.tmp-999999-00000000").mkdir()
    with pytest.raises(ArtifactExistsError, match="overwrite"):
        write(target, "two")
    assert entries(tmp_path) == ["artefact"]
    assert Artifact.open(target).file("sub/a.txt").read_text() == "one"


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("replace", [True, False])
def test_a_failing_sync_of_the_parent_undoes_the_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, replace: bool
) -> None:
    target = tmp_path / "artefact"
    if replace:
        write(target)
    if not exchange:
        monkeypatch.setattr(durable, "exchange", lambda one, other: False)
    real = durable.sync

    def failing(path: Path, *, mode: int | None = None) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        real(path, mode=mode)

    monkeypatch.setattr(durable, "sync", failing)
    with pytest.raises(ArtifactError, match="Input/output"):
        write(target, "two", overwrite=True)
    monkeypatch.undo()
    assert entries(tmp_path) == (["artefact"] if replace else [])
    if replace:
        assert Artifact.open(target).file("sub/a.txt").read_text() == "one"
