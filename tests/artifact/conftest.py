"""Children that can be killed or starved at any system call."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

Strace = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def strace(tmp_path: Path, missing: Callable[[str], NoReturn]) -> Strace:
    """Run Python code under strace: `strace(options, code, *arguments)`; the log is in `.stdout`."""
    if not shutil.which("strace"):
        missing("strace is not installed; install it: apt-get install strace")
    probe = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        missing(f"strace may not trace here: {probe.stderr.strip()}")

    def run(options: Sequence[str], code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        log = tmp_path / "strace.log"
        # One core: no library then starts threads, so the k-th system call is the same in every run.
        one_core = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
        child = [sys.executable, "-c", one_core + code, *arguments]
        command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), *options, *child]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        done.args = done.stdout  # what the child itself printed
        done.stdout = log.read_text()
        return done

    return run
