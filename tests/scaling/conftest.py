"""A tiny exported model, and corpus jobs in processes of their own that can be killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import lmopt
from lmopt.testing.models import VOCAB_SIZE, tiny_llama

DRIVER = """
import json, sys
from lmopt.scaling import batch
batch(**json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="session")
def tiny_model() -> lmopt.Model:
    """The tiny Llama, whose words are `w0 .. w96`."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return lmopt.Model.from_module(tiny_llama(), words)


@pytest.fixture(scope="session")
def artifact(tiny_model: lmopt.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ONNX artefact."""
    folder = tmp_path_factory.mktemp("scaling") / "artifact"
    lmopt.Exporter("onnx", target="onnxruntime").export(tiny_model, folder)
    return folder


def children_of(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return true()


class Drivers:
    """Starts corpus jobs in processes of their own, and ends what is left of them."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def start(self, arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, arguments], stderr=subprocess.PIPE, text=True
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        for process in self._started:
            for pid in children_of(process.pid) if process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
            process.kill()
            process.communicate()


@pytest.fixture
def drivers() -> object:
    found = Drivers()
    yield found
    found.end()


@pytest.fixture(scope="session")
def watch() -> object:
    """Look at processes: `children_of`, `alive`, `wait_until`."""
    from types import SimpleNamespace

    return SimpleNamespace(children_of=children_of, alive=alive, wait_until=wait_until)
