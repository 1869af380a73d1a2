"""A cache of its own, a closed network, and the real model where it is there."""

import os
import socket
from pathlib import Path

import pytest

from lmopt.testing.workshop import kept

ASSETS = Path(os.environ.get("LMOPT_TEST_ASSETS") or Path.home() / ".cache" / "lmopt-test-assets")


def pytest_configure():
    # Read when torch is first imported: its threads must not spin while they wait for cores that other workers use.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_args, **_keywords):
        raise RuntimeError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session", autouse=True)
def workshop(tmp_path_factory):
    """The kit's tiny models, which the contract is proved on, too: each exported once for all workers of a session."""
    folder = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have folders of their own, side by side.
    made = kept()
    made.share((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "kit")
    return made


def asset(name):
    path = ASSETS / name
    if not path.exists():
        what = f"{path} is not there; fetch it with lmopt's scripts/fetch_test_assets.py"
        if os.environ.get("LMOPT_REQUIRE_ASSETS") == "1":
            pytest.fail(f"{what} (LMOPT_REQUIRE_ASSETS=1 forbids skipping)")
        pytest.skip(what)
    return path


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    return asset("smollm2-135m")


@pytest.fixture(scope="session")
def wiki_text():
    """The text of lmopt's perplexity figures."""
    return asset("wiki.txt").read_text(encoding="utf-8")
