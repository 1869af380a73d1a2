"""A tiny model on the built-in engines: eager, as a portable graph, and as a fused one."""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny():
    from lmopt.model import Model
    from lmopt.testing.models import tiny_llama

    return Model.from_module(tiny_llama())


@pytest.fixture(scope="session", params=["torch", "onnxruntime", "fused"])
def opener(request: pytest.FixtureRequest, tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Opens a runtime of the tiny model, with one thread unless told otherwise."""
    from lmopt.exporter import Exporter
    from lmopt.runtime import Runtime

    if request.param != "fused":
        return functools.partial(Runtime, tiny, backend=request.param, threads=1)
    folder = tmp_path_factory.mktemp("fused") / "tiny"
    artifact = Exporter("onnx", target="onnxruntime").export(tiny, folder)
    assert artifact.manifest["formats"]["onnx"]["target"] == "onnxruntime"
    return functools.partial(Runtime, artifact, backend="onnxruntime", threads=1, deterministic=True)


@pytest.fixture(scope="session")
def runtime(opener) -> Iterator:
    with opener() as found:
        yield found
