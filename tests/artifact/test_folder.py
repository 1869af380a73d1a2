"""An artefact is opened only if every bit of it is what was written."""

import os
import random
import shutil
from pathlib import Path

import pytest

from lmopt.artifact import MANIFEST, Artifact, is_artifact, publish
from lmopt.contracts import ArtifactView
from lmopt.errors import ArtifactError, ArtifactNotFoundError, CorruptArtifactError, UnsafeArtifactError
from lmopt.types import ModelFacts

CONTENT = {
    "model.onnx.data": random.Random(0).randbytes(300_000),
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
    "assets/vocabulary.txt": b"a\nb\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "artefact"
    with publish(target) as staging:
        (staging.path / "assets").mkdir()
        for name, content in CONTENT.items():
            (staging.path / name).write_bytes(content)
        staging.manifest["formats"] = {"onnx": {"opset": 20}, "gguf": {}}
        staging.manifest["model"] = {"vocab_size": 7, "context_length": 16}
    return target


def test_open(folder: Path) -> None:
    artifact = Artifact.open(folder)
    view: ArtifactView = artifact
    assert view.path == folder
    assert artifact.formats == ("gguf", "onnx")
    assert artifact.facts == ModelFacts(7, 16)
    assert set(artifact.manifest["files"]) == set(CONTENT)
    for name, content in CONTENT.items():
        assert artifact.file(name).read_bytes() == content


def test_unlisted_name(folder: Path) -> None:
    artifact = Artifact.open(folder)
    for name in ("nothing", MANIFEST, "../artefact/config.json", "assets"):
        with pytest.raises(ArtifactNotFoundError, match=r"config\.json"):
            artifact.file(name)


@pytest.mark.parametrize("verify", [True, False])
def test_a_flipped_bit_is_noticed_and_named(folder: Path, verify: bool, full_sweep: bool) -> None:
    source = random.Random(1)
    names = [*CONTENT, MANIFEST]
    names.remove("empty.txt")
    for number in range(1000 if full_sweep else 100):
        name = names[number % len(names)]
        raw = bytearray((folder / name).read_bytes())
        sound = bytes(raw)
        raw[source.randrange(len(raw))] ^= 1 << source.randrange(8)
        (folder / name).write_bytes(raw)
        with pytest.raises(CorruptArtifactError) as caught:
            Artifact.open(folder, verify=verify).file(name)
        assert name in str(caught.value)
        (folder / name).write_bytes(sound)
    Artifact.open(folder)


def swap(folder: Path) -> None:
    os.rename(folder / "config.json", folder / "x")
    os.rename(folder / "assets/vocabulary.txt", folder / "config.json")
    os.rename(folder / "x", folder / "assets/vocabulary.txt")


def replace_by_link(folder: Path, target: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)


TAMPERINGS = {
    "truncated": (
        lambda f: os.truncate(f / "model.onnx.data", 299_999),
        "model.onnx.data",
        CorruptArtifactError,
    ),
    "emptied": (lambda f: os.truncate(f / "config.json", 0), "config.json", CorruptArtifactError),
    "extended": (lambda f: os.truncate(f / "empty.txt", 1), "empty.txt", CorruptArtifactError),
    "dropped": (lambda f: (f / "config.json").unlink(), "config.json", CorruptArtifactError),
    "added": (lambda f: (f / "modeling_x.py").write_text("evil"), "modeling_x.py", CorruptArtifactError),
    "added below": (lambda f: (f / "assets/x").write_text("evil"), "assets/x", CorruptArtifactError),
    "added folder": (
        lambda f: shutil.copytree(f / "assets", f / "b"),
        "b/vocabulary.txt",
        CorruptArtifactError,
    ),
    "added link": (lambda f: (f / "l").symlink_to("/etc"), "'l'", CorruptArtifactError),
    "added dangling link": (lambda f: (f / "l").symlink_to("/nothing"), "'l'", CorruptArtifactError),
    "swapped": (swap, "bytes", CorruptArtifactError),
    "folder instead": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json",
        UnsafeArtifactError,
    ),
    "pipe instead": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "config.json",
        UnsafeArtifactError,
    ),
    "link that leaves": (lambda f: replace_by_link(f, f.parent / "c"), "config.json", UnsafeArtifactError),
    "manifest dropped": (lambda f: (f / MANIFEST).unlink(), "not an lmopt artefact", ArtifactNotFoundError),
    "manifest emptied": (lambda f: os.truncate(f / MANIFEST, 0), MANIFEST, CorruptArtifactError),
    "manifest linked": (
        lambda f: (shutil.move(f / MANIFEST, f.parent / "m"), (f / MANIFEST).symlink_to("../m")),
        MANIFEST,
        UnsafeArtifactError,
    ),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("tamper", "named", "error"), TAMPERINGS.values(), ids=TAMPERINGS)
def test_tampering(folder: Path, tamper: object, named: str, error: type[ArtifactError]) -> None:
    # A copy of the right bytes outside: only the link itself can be what is refused.
    (folder.parent / "c").write_bytes(CONTENT["config.json"])
    tamper(folder)
    with pytest.raises(error) as caught:
        Artifact.open(folder)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", [".gitattributes", ".gitignore"])
def test_what_git_adds_is_tolerated(folder: Path, name: str) -> None:
    (folder / name).write_text("x")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    Artifact.open(folder)


def test_hugging_face_cache_layout(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate([*CONTENT, MANIFEST]):
        shutil.copy(folder / name, blobs / str(number))
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(number))
    assert Artifact.open(snapshot).file("config.json").read_bytes() == CONTENT["config.json"]
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(UnsafeArtifactError):
        Artifact.open(snapshot)


def test_each_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmopt.artifact import folder as module

    hashed: list[str] = []
    real = module.file_hash
    monkeypatch.setattr(module, "file_hash", lambda path: (hashed.append(path.name), real(path))[1])
    artifact = Artifact.open(folder, verify=False)
    assert hashed == []
    artifact.file("config.json")
    artifact.file("config.json")
    assert hashed == ["config.json"]
    artifact.verify()
    assert sorted(hashed) == sorted(["config.json", *(Path(name).name for name in CONTENT)])


def test_verify_looks_again(folder: Path) -> None:
    artifact = Artifact.open(folder)
    (folder / "config.json").write_bytes(b'{"a": 2}')
    with pytest.raises(CorruptArtifactError, match=r"config\.json"):
        artifact.verify()


def test_facts_that_are_not_there(tmp_path: Path) -> None:
    with publish(tmp_path / "a"):
        pass
    with pytest.raises(CorruptArtifactError, match="model"):
        _ = Artifact.open(tmp_path / "a").facts


def test_the_error_says_what_is_there(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        assert not is_artifact(path)
        with pytest.raises(ArtifactNotFoundError) as caught:
            Artifact.open(path)
        return str(caught.value)

    assert "nothing" in message(tmp_path / "x")
    assert "nothing" in message(tmp_path / ("x" * 300))
    assert "empty" in message(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "no folder" in message(tmp_path / "x.gguf")
    assert "x.gguf" in message(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "Hugging Face" in message(tmp_path)
    assert "from_pretrained" in message(tmp_path)
