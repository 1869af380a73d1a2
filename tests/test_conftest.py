"""The guards of the test suite hold: a test that leaves this machine fails."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_a_connection_to_another_machine_is_refused() -> None:
    with socket.socket() as one, pytest.raises(RuntimeError, match=r"192\.0\.2\.1"):
        one.connect(("192.0.2.1", 9))


def test_a_name_of_another_machine_is_not_looked_up() -> None:
    with pytest.raises(RuntimeError, match=r"example\.invalid"):
        socket.create_connection(("example.invalid", 443), timeout=1)


def test_loopback_stays_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"here"))
        thread.start()
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            assert client.recv(4) == b"here"
        thread.join()


def test_the_cache_is_not_the_users(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert Path(os.environ["LMOPT_CACHE"]).is_relative_to(tmp_path_factory.getbasetemp())


CASES = """
import pytest

@pytest.mark.gpu
def test_sees_a_gpu(gpu_figures):
    gpu_figures["tokens per second"] = 7.5

@pytest.mark.gpu
def test_is_wrong():
    assert False, "numbers differ"

def test_needs_none():
    pass
"""
PROBE = """
from lmopt import accelerators

found = accelerators.Cuda((accelerators.CudaDevice(0, "Card", "8.9", 1 << 30),) if {there} else (), {problem!r})
accelerators.cuda = lambda: found
"""


@pytest.fixture
def pytest_with(tmp_path: Path) -> Callable[..., tuple[dict[str, int], str]]:
    """Run pytest in a process of its own under this suite's conftest, with an answer of the probe."""

    def run(*options: str, problem: str = "") -> tuple[dict[str, int], str]:
        shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "conftest.py")
        (tmp_path / "test_cases.py").write_text(CASES)
        (tmp_path / "probe.py").write_text(PROBE.format(there=not problem, problem=problem))
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "probe",
                "-p",
                "no:randomly",
                "-p",
                "no:cacheprovider",
                "-rA",
                *options,
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        words = done.stdout.splitlines()[-1].replace(",", "").split()
        kinds = ("passed", "failed", "errors", "skipped", "deselected")
        return {one: int(words[place - 1]) for place, one in enumerate(words) if one in kinds}, done.stdout

    return run


def test_without_a_gpu_its_tests_are_skipped_with_the_reason(pytest_with: Any) -> None:
    counts, said = pytest_with(problem="there is no usable CUDA driver")
    assert counts == {"passed": 1, "skipped": 2}
    assert "there is no usable CUDA driver" in said


def test_require_gpu_makes_failures_of_skips(pytest_with: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("-m", "gpu", "--require-gpu", "--gpu-report", str(report))
    counts, said = pytest_with(*options, problem="there is no usable CUDA driver")
    assert counts == {"errors": 2, "deselected": 1}
    assert "there is no usable CUDA driver (--require-gpu forbids skipping)" in said
    outcomes = json.loads(report.read_text())["tests"]
    assert len(outcomes) == 2
    assert all(one.startswith("failed: ") and "no usable CUDA driver" in one for one in outcomes.values())


def test_the_report_holds_machine_outcomes_and_figures(pytest_with: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    counts, _ = pytest_with("--require-gpu", "--gpu-report", str(report))
    assert counts == {"failed": 1, "passed": 2}
    found = json.loads(report.read_text())
    assert found["tests"]["test_cases.py::test_sees_a_gpu"] == "passed"
    assert "numbers differ" in found["tests"]["test_cases.py::test_is_wrong"]
    assert "test_cases.py::test_needs_none" not in found["tests"]
    assert found["figures"] == {"tokens per second": 7.5}
    assert found["cuda"]["devices"][0]["name"] == "Card"
    assert all(found[name] for name in ("lmopt", "machine", "accelerators"))
