"""One build for all, whoever asks, whatever dies, whatever rots."""

import os
import random
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmopt.artifact import MANIFEST, Artifact, Staging, cache_folder, cached
from lmopt.errors import ArtifactError, DiskFullError, LockTimeoutError

KEY: Mapping[str, Any] = {"model": "abc", "opset": 20, "options": {"dtype": "float32"}, "threads": None}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMOPT_CACHE", str(tmp_path / "parent" / "cache"))
    return tmp_path / "parent" / "cache"


class Builder:
    """Counts its calls."""

    def __init__(self, text: str = "built") -> None:
        self.text = text
        self.calls = 0

    def __call__(self, staging: Staging) -> None:
        self.calls += 1
        (staging.path / "a.txt").write_text(self.text)
        (staging.path / "b.bin").write_bytes(bytes(1000))


# Where it is -------------------------------------------------------------------------------------


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "parent" / "cache"
    monkeypatch.delenv("LMOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lmopt"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert cache_folder() == tmp_path / "home" / ".cache" / "lmopt"
    monkeypatch.setenv("LMOPT_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "home" / "mine"
    assert os.listdir(tmp_path) == []


def test_it_is_private_and_made_when_first_written(cache: Path) -> None:
    assert not cache.exists()
    before = os.umask(0)
    try:
        cached(KEY, Builder())
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_an_unusable_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LMOPT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ArtifactError, match="LMOPT_CACHE"):
        cached(KEY, Builder())


# The key -----------------------------------------------------------------------------------------


def test_built_once(cache: Path) -> None:
    build = Builder()
    first = cached(KEY, build)
    again = cached(dict(reversed(list(KEY.items()))), build)
    assert build.calls == 1
    assert first.path == again.path
    assert again.file("a.txt").read_text() == "built"
    assert again.manifest["source"]["cache_key"] == KEY


def change(value: Any, data: st.DataObject) -> Any:
    """Change one leaf of a key."""
    if isinstance(value, dict) and value:
        name = data.draw(st.sampled_from(sorted(value)))
        return {**value, name: change(value[name], data)}
    numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    leaves = st.none() | st.booleans() | st.text(max_size=5) | numbers
    return data.draw(leaves.filter(lambda new: repr(new) != repr(value)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_the_key_is_a_miss(data: st.DataObject) -> None:
    cached(KEY, Builder())
    other = Builder("other")
    assert cached(change(KEY, data), other).path != cached(KEY, Builder()).path


def test_an_entry_of_another_key_is_not_taken(cache: Path) -> None:
    wrong = cached({"other": 1}, Builder("wrong")).path
    right = cached(KEY, Builder()).path
    for name in os.listdir(right):
        (right / name).write_bytes((wrong / name).read_bytes())
    with pytest.warns(RuntimeWarning, match="another key"):
        assert cached(KEY, Builder()).file("a.txt").read_text() == "built"


@pytest.mark.parametrize("key", [{1: 2}, {"a": Path("/x")}, {"a": float("nan")}, {"a": {1, 2}}])
def test_keys_that_are_not_plain(key: Any) -> None:
    with pytest.raises(ArtifactError, match="cache key"):
        cached(key, Builder())


# Failures ----------------------------------------------------------------------------------------


def test_a_failing_build_leaves_nothing(cache: Path) -> None:
    def build(staging: Staging) -> None:
        (staging.path / "a").write_text("x")
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        cached(KEY, build)
    assert [path.suffix for path in (cache / "artifacts").iterdir()] == [".lock"]
    assert cached(KEY, Builder()).file("a.txt").read_text() == "built"


def test_a_full_disk_is_told(cache: Path) -> None:
    def build(staging: Staging) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError):
        cached(KEY, build)


def corrupt(entry: Path, source: random.Random) -> str:
    """Damage an entry in one of several ways."""
    kind = source.choice(
        ["flip", "flip", "empty", "truncate", "drop", "add", "no manifest", "all gone", "a file"]
    )
    victim = entry / source.choice(["a.txt", "b.bin", MANIFEST])
    raw = bytearray(victim.read_bytes())
    if kind == "flip":
        raw[source.randrange(len(raw))] ^= 1 << source.randrange(8)
        victim.write_bytes(raw)
    elif kind in ("empty", "truncate"):
        os.truncate(victim, 0 if kind == "empty" else source.randrange(len(raw)))
    elif kind == "drop":
        victim.unlink()
    elif kind == "add":
        (entry / "c.txt").write_text("x")
    elif kind == "no manifest":
        (entry / MANIFEST).unlink()
    else:
        for path in entry.iterdir():
            path.unlink()
        if kind == "a file":
            entry.rmdir()
            entry.write_text("x")
    return f"{kind} {victim.name}"


@pytest.mark.slow
def test_damage_heals_with_one_warning(cache: Path, full_sweep: bool) -> None:
    source = random.Random(7)
    entry = cached(KEY, Builder()).path
    for _ in range(200 if full_sweep else 40):
        what = corrupt(entry, source)
        build = Builder()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert cached(KEY, build).file("a.txt").read_text() == "built", what
        assert len(caught) == 1, what
        assert "quarantine" in str(caught[0].message)
        assert caught[0].filename == __file__
        assert build.calls == 1, what
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cached(KEY, build)
        assert build.calls == 1, what
    # Only the last damaged one is kept: a disk that rots must not fill itself.
    assert os.listdir(cache / "quarantine") == [entry.name]


def test_what_a_killed_builder_of_any_key_left_is_removed(cache: Path) -> None:
    cached(KEY, Builder())
    left = cache / "artifacts" / ".0123.tmp-999999-00000000"
    left.mkdir()
    (left / "half").write_text("x")
    cached({"other": 1}, Builder())
    assert not left.exists()


# Many processes ----------------------------------------------------------------------------------

CHILD = """
import os, sys, time, warnings
warnings.simplefilter("error")
from lmopt.artifact import cached

def build(staging):
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    first = os.fstat(log).st_size == 0
    os.write(log, f"{os.getpid()}\\n".encode())
    (staging.path / "a.txt").write_text("half")
    time.sleep(float(sys.argv[2]) if first else 0.1)
    (staging.path / "a.txt").write_text("whole")

print(cached({"round": sys.argv[3]}, build).file("a.txt").read_text())
"""


def start(log: Path, pause: float, number: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(log), str(pause), str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kill", [False, True])
def test_processes_share_one_build(tmp_path: Path, cache: Path, full_sweep: bool, kill: bool) -> None:
    for number in range(10 if full_sweep else 2):
        log = tmp_path / f"log-{number}"
        children = [start(log, 600 if kill else 0.3, number) for _ in range(8)]
        if kill:
            while not (log.exists() and log.stat().st_size):
                time.sleep(0.01)
            victim = int(log.read_text())
            os.kill(victim, signal.SIGKILL)
        for child in children:
            text, _ = child.communicate(timeout=120)
            if kill and child.pid == victim:
                assert child.returncode == -signal.SIGKILL
            else:
                assert (child.returncode, text) == (0, "whole\n")
        assert len(log.read_text().split()) == (2 if kill else 1)
    assert not list((cache / "artifacts").glob(".*"))
    assert not (cache / "quarantine").exists()


def test_waiting_has_an_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = start(log, 600, 0)
    try:
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        with pytest.raises(LockTimeoutError, match="lock"):
            cached({"round": "0"}, Builder(), timeout=0.2)
    finally:
        child.kill()
        child.communicate()


def test_a_read_only_hit_takes_no_lock(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(KEY, Builder())
    monkeypatch.setattr("lmopt.artifact.cache.FileLock", None)
    assert isinstance(cached(KEY, Builder()), Artifact)
