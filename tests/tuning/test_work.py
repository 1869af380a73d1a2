"""Work in processes of its own: every way to end is told apart."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lmopt.tuning.work import InProcess, Limits, WorkError

JOBS = """
import os, signal, sys, time
import numpy as np
from lmopt.errors import InputError

def fine(number, tell):
    print("libraries may print")
    tell("count", number, 9)
    return {"number": number + 1}

def wrong(tell):
    raise InputError("the text is too short")

def defect(tell):
    return {}["missing"]

def crash(tell):
    sys.stderr.write("kernel: assertion failed\\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)

def killed(tell):
    os.kill(os.getpid(), signal.SIGKILL)

def eat(tell):
    held = []
    while True:
        held.append(np.ones(1 << 21))
        time.sleep(0.01)

def refuse(tell):
    raise MemoryError("no room for 8 GB")

def sleep(tell):
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    (tmp_path / "made_up_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    runner = InProcess(tmp_path / "last.log")

    def call(
        name: str, *, seconds: float = 60.0, memory_bytes: int | None = None, **arguments: object
    ) -> dict:
        told = []
        try:
            return runner(
                f"made_up_jobs:{name}",
                arguments,
                Limits(seconds, memory_bytes),
                lambda *now: told.append(now),
            ) | {"told": told}
        except WorkError as error:
            return {"kind": error.kind, "reason": str(error)}

    return call


def test_a_result_and_its_progress_come_back(run) -> None:
    found = run("fine", number=2)
    assert found["number"] == 3
    assert found["told"] == [("count", 2, 9)]
    assert found["seconds"] > 0


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("wrong", "error", "InputError: the text is too short"),
        ("defect", "error", "KeyError"),
        ("crash", "crash", "SIGSEGV (kernel: assertion failed"),
        ("killed", "memory", "memory was short"),
        ("refuse", "memory", "no room for 8 GB"),
    ],
)
def test_every_way_to_fail_is_named(run, name, kind, words) -> None:
    found = run(name)
    assert found["kind"] == kind
    assert words in found["reason"]


def test_what_takes_too_much_memory_is_ended(run) -> None:
    found = run("eat", memory_bytes=300_000_000)
    assert found["kind"] == "memory"
    assert "the limit is 300 MB" in found["reason"]


def test_what_takes_too_long_is_ended(run) -> None:
    found = run("sleep", seconds=2.0)
    assert found == {"kind": "time", "reason": "it took more than 2 s"}
