"""No name inside a model leads out of the model's folder."""

import os
from pathlib import Path

import pytest

from lmopt.errors import ArtifactError, ArtifactNotFoundError, CorruptArtifactError, UnsafeArtifactError
from lmopt.safefiles import contained, hub_blobs, open_regular


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"inside")
    (folder / "sub" / "more.bin").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (tmp_path / "model-2").mkdir()
    (tmp_path / "model-2" / "secret").write_bytes(b"outside")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "relative-link").symlink_to("../secret")
    (folder / "prefix-link").symlink_to("../model-2/secret")
    (folder / "linked-folder").symlink_to(tmp_path)
    (folder / "chain").symlink_to("link")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    (folder / "hard").hardlink_to(tmp_path / "secret")
    (folder / "inner-link").symlink_to("weights.bin")
    os.mkfifo(folder / "pipe")
    return folder


ATTACKS = {
    "parent": ("../secret", UnsafeArtifactError),
    "nested parent": ("sub/../../secret", UnsafeArtifactError),
    "parent that stays inside": ("sub/../weights.bin", UnsafeArtifactError),
    "prefix of the folder's name": ("../model-2/secret", UnsafeArtifactError),
    "absolute": ("/etc/passwd", UnsafeArtifactError),
    "double slash": ("//etc/passwd", UnsafeArtifactError),
    "backslash": ("..\\secret", UnsafeArtifactError),
    "drive": ("C:\\secret", UnsafeArtifactError),
    "link to a file": ("link", UnsafeArtifactError),
    "relative link": ("relative-link", UnsafeArtifactError),
    "link to a folder of the same prefix": ("prefix-link", UnsafeArtifactError),
    "chain of links": ("chain", UnsafeArtifactError),
    "linked folder": ("linked-folder/secret", UnsafeArtifactError),
    "hard link": ("hard", UnsafeArtifactError),
    "pipe": ("pipe", UnsafeArtifactError),
    "folder": ("sub", UnsafeArtifactError),
    "the folder itself": (".", UnsafeArtifactError),
    "empty": ("", CorruptArtifactError),
    "NUL": ("weights.bin\0.txt", CorruptArtifactError),
    "loop": ("loop", CorruptArtifactError),
    "too long": ("x" * 5000, CorruptArtifactError),
    "lone surrogate": ("\ud800", ArtifactError),
    "dangling": ("dangling", ArtifactNotFoundError),
    "file as a folder": ("weights.bin/x", ArtifactNotFoundError),
    "missing": ("nothing", ArtifactNotFoundError),
}


@pytest.mark.parametrize(("name", "error"), ATTACKS.values(), ids=ATTACKS)
def test_refused(model: Path, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        contained(model, name, allow_hardlinks=False)


@pytest.mark.parametrize("name", ["weights.bin", "sub/more.bin", "inner-link", "./weights.bin"])
def test_accepted(model: Path, name: str) -> None:
    assert contained(model, name, allow_hardlinks=False).read_bytes() == b"inside"


def test_hard_links_are_the_callers_choice(model: Path) -> None:
    assert contained(model, "hard").read_bytes() == b"outside"


def test_a_linked_model_folder_is_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(model)
    assert contained(tmp_path / "alias", "weights.bin") == model / "weights.bin"


def test_hugging_face_cache_layout(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "0123abc"
    (snapshot / "onnx").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "cafe").write_bytes(b"blob")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    (snapshot / "model.onnx").symlink_to("../../blobs/cafe")
    (snapshot / "escape").symlink_to("../../refs/main")
    (snapshot / "onnx" / "model.onnx").symlink_to("../../../blobs/cafe")
    blobs = hub_blobs(snapshot)
    assert blobs == repo / "blobs" == hub_blobs(snapshot / "onnx")
    assert contained(snapshot, "model.onnx", allow_symlinks_into=blobs).read_bytes() == b"blob"
    assert contained(snapshot / "onnx", "model.onnx", allow_symlinks_into=blobs).read_bytes() == b"blob"
    with pytest.raises(UnsafeArtifactError):
        contained(snapshot, "model.onnx")
    with pytest.raises(UnsafeArtifactError):
        contained(snapshot, "escape", allow_symlinks_into=blobs)


def test_linked_blobs_are_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "m" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "m" / "blobs").symlink_to("/etc")
    assert hub_blobs(tmp_path / "m" / "snapshots" / "1") is None
    assert hub_blobs(tmp_path) is None


@pytest.mark.timeout(20)
def test_opening_never_waits(model: Path) -> None:
    with pytest.raises(UnsafeArtifactError), open_regular(model / "pipe"):
        pass
    with pytest.raises(UnsafeArtifactError), open_regular(model):
        pass
    with pytest.raises(UnsafeArtifactError), open_regular("/dev/zero"):
        pass
    with pytest.raises(ArtifactNotFoundError), open_regular(model / "nothing"):
        pass
