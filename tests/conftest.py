"""What every test may rely on: the real assets, a cache of its own, and a closed network."""

import functools
import json
import os
import socket
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

ASSETS = Path(os.environ.get("LMOPT_TEST_ASSETS") or Path.home() / ".cache" / "lmopt-test-assets")
_TAKE_MINUTES = {
    "test_builtin_backends.py",
    "test_checks.py",
    "test_end_to_end.py",
    "test_examples.py",
    "test_export_encoder_decoder.py",
    "test_notebooks.py",
    "test_pages.py",
    "test_parallel.py",
    "test_smollm2.py",
    "test_tasks.py",
    "test_tensor_parallel.py",
}
FETCH = f"{sys.executable} scripts/fetch_test_assets.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-sweep",
        action="store_true",
        help="run the tests marked `slow` in full size (hours, not minutes)",
    )
    parser.addoption(
        "--require-gpu",
        action="store_true",
        help="fail the tests marked `gpu` where there is no usable GPU, in place of skipping them",
    )
    parser.addoption("--gpu-report", metavar="FILE", help="write what the tests marked `gpu` found as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "network: may open connections beyond this machine")
    # Files in the order of the tests, not of how many each has: see `pytest_collection_modifyitems`.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    # Read by OpenMP when torch or numpy is first imported: never more threads than this process may use.
    os.environ.setdefault("OMP_NUM_THREADS", str(min(4, len(os.sched_getaffinity(0)))))
    # Threads that spin while they wait take the cores from the other workers, whose work they wait for: a tiny LSTM
    # then takes a hundred times its time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None]:
    """Begin with the files that take minutes, so that in the end no worker is left alone with one."""
    yield  # pytest-randomly has shuffled them by then
    items.sort(key=lambda item: item.path.name not in _TAKE_MINUTES)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("sweep") and not item.config.getoption("--full-sweep"):
        pytest.skip("runs with --full-sweep; a normal run has others of its kind")
    if item.get_closest_marker("gpu") and (reason := _gpu_problem()):
        if item.config.getoption("--require-gpu"):
            pytest.fail(f"{reason} (--require-gpu forbids skipping)", pytrace=False)
        pytest.skip(reason)


@functools.cache
def _gpu_problem() -> str:
    """Say why no CUDA device can be used; `""` if one can."""
    from lmopt.accelerators import cuda

    return cuda().problem


_FIGURES = pytest.StashKey[dict[str, Any]]()
_OUTCOMES = pytest.StashKey[dict[str, str]]()


@pytest.fixture(scope="session")
def gpu_figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Where tests marked `gpu` put figures for the report of `--gpu-report`."""
    return request.config.stash.setdefault(_FIGURES, {})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember what became of tests marked `gpu`."""
    report = yield
    if item.get_closest_marker("gpu") and (report.when == "call" or not report.passed):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        outcomes = item.config.stash.setdefault(_OUTCOMES, {})
        outcomes[item.nodeid] = "passed" if report.passed else f"{report.outcome}: {why}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report: the machine, the accelerators, what became of each test, and the figures."""
    if not (path := session.config.getoption("--gpu-report")):
        return
    from dataclasses import asdict

    from lmopt import __version__
    from lmopt.accelerators import accelerators, cuda
    from lmopt.platform import machine

    found = {
        "lmopt": __version__,
        "machine": machine(),
        "cuda": asdict(cuda()),
        "accelerators": [asdict(one) for one in accelerators()],
        "tests": session.config.stash.get(_OUTCOMES, {}),
        "figures": session.config.stash.get(_FIGURES, {}),
    }
    Path(path).write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def _missing(what: str) -> NoReturn:
    """Skip a test that lacks something from outside, or fail it where everything must be there.

    A green run on a machine that sets LMOPT_REQUIRE_ASSETS=1 (`.ci/run` does) thus hides nothing.
    """
    if os.environ.get("LMOPT_REQUIRE_ASSETS") == "1":
        pytest.fail(f"{what} (LMOPT_REQUIRE_ASSETS=1 forbids skipping)")
    pytest.skip(what)


def _asset(name: str) -> Path:
    path = ASSETS / name
    if not path.exists():
        _missing(f"test asset {path} is not there; fetch it: {FETCH}")
    return path


@pytest.fixture(scope="session")
def missing() -> Callable[[str], NoReturn]:
    """Call it with what is not there: skips, or fails where LMOPT_REQUIRE_ASSETS=1."""
    return _missing


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, fp32."""
    if not (ASSETS / "smollm2-135m.DONE").is_file():
        _missing(f"test asset {ASSETS / 'smollm2-135m'} is not there, or not whole; make it: {FETCH}")
    return _asset("smollm2-135m")


@pytest.fixture(scope="session")
def assert_greedy() -> Callable[[Any, list[int], list[int]], None]:
    """Hold tokens after a prompt against one pass of a transformers module: one row, no cache, on the CPU.

    Each must be the likeliest, or as likely as rounding can tell.
    """
    import numpy as np
    import torch

    from lmopt.evaluation import TOLERANCES

    tie = TOLERANCES["float32"].tie

    def check(module: Any, prompt: list[int], tokens: list[int]) -> None:
        with torch.inference_mode():
            logits = module(torch.tensor([prompt + tokens])).logits[0].numpy()[len(prompt) - 1 : -1]
        best = logits.max(-1)
        gap = best - logits[np.arange(len(tokens)), tokens]
        greedy = gap <= 2 * (tie + tie * np.abs(best))
        assert greedy.all(), f"token {int(np.argmin(greedy))} after {prompt[:8]}... is not torch's"

    return check


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1)."""
    return _asset("smollm2-135m-instruct-q4_1/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def wiki_text() -> str:
    """2.7 million characters of Wikipedia: the text of the perplexity figures."""
    return _asset("wiki.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def botchan_text() -> str:
    """An English novel, for calibration and for prompts."""
    return _asset("botchan.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def whisper_tiny() -> Path:
    """Whisper tiny.en as a Hugging Face folder, fp32; never asked for where all assets must be there."""
    return _speech("whisper-tiny.en")


@pytest.fixture(scope="session")
def librivox() -> Path:
    """Five clips of a reading, `fileids` with their names and `transcription` with what is said."""
    return _speech("librivox")


def _speech(name: str) -> Path:
    if not ((ASSETS / f"{name}.DONE").is_file() and (ASSETS / name).exists()):
        pytest.skip(f"test asset {ASSETS / name} is not there; fetch it: {FETCH} --speech")
    return ASSETS / name


@pytest.fixture(scope="session")
def full_sweep(request: pytest.FixtureRequest) -> bool:
    """Whether `--full-sweep` was given."""
    return bool(request.config.getoption("--full-sweep"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the session a cache that nobody else reads or writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMOPT_CACHE", str(tmp_path_factory.mktemp("lmopt-cache")))
        yield


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Undo what a test does to torch's thread count, which is global to the process."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None and sys.modules["torch"].get_num_threads() != before:
        sys.modules["torch"].set_num_threads(before)


class NetworkForbiddenError(RuntimeError):
    """A test tried to leave this machine."""


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections and name look-ups beyond this machine, unless a test is marked `network`."""
    if request.node.get_closest_marker("network"):
        return

    def guard(name: str, owner: object, host_of: object) -> None:
        real = getattr(owner, name)

        def guarded(*args: object, **kwargs: object) -> object:
            host = host_of(*args, **kwargs)
            if not _is_local(host):
                raise NetworkForbiddenError(
                    f"this test tried to reach {host!r} ({name}). Mark it `network` if that is its purpose"
                )
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    for name in ("connect", "connect_ex"):
        guard(name, socket.socket, lambda _socket, address: address[0] if isinstance(address, tuple) else "")
    for name in ("getaddrinfo", "gethostbyname"):
        guard(name, socket, lambda host, *_args, **_kwargs: host)


def _is_local(host: object) -> bool:
    """Say whether a host is this machine; a path of a Unix socket, given as `""`, is."""
    if isinstance(host, bytes):
        host = host.decode()
    return host in (None, "", "localhost", "::1", socket.gethostname()) or str(host).startswith("127.")
