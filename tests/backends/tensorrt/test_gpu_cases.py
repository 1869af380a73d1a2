"""What is to be seen on a GPU, tried on the fake, so that no GPU's time is lost to a mistake in the tests."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import lmopt.backends.tensorrt.cuda as calls
from lmopt.accelerators import Cuda
from lmopt.backends.tensorrt import engine_cache
from lmopt.runtime import Runtime

HERE = Path(__file__).parent
CASES = sys.modules["tensorrt_tests_test_on_gpu"]
walking = sys.modules["tensorrt_tests_walking"]
# What a fake cannot do: half types beside ONNX Runtime, another engine's device, a real model's time.
LEFT_OUT = {
    "test_64_greedy_tokens_of_smollm2",
    "test_onnxruntime_on_cuda_is_on_cuda",
    "test_torch_on_cuda_does_not_round",
    "test_speed_beside_the_others",
}
NAMES = sorted(name for name in vars(CASES) if name.startswith("test_") and name not in LEFT_OUT)


@pytest.fixture
def artifact_of(workshop):
    return lambda dtype: workshop.subject("llama", "onnx", dtype).artifact


@pytest.fixture
def tensorrt(artifact_of, device, monkeypatch):
    """As there: with the real compiler, for the GPU that the fake says it is; the fake runs the graph."""
    real, opened = engine_cache.plan_for, []

    def plan_for(artifact, *arguments, **more):
        plan = real(artifact, *arguments, **more)
        device.trust(plan, artifact.file("model.onnx"))
        return plan

    monkeypatch.setattr(engine_cache, "plan_for", plan_for)

    def get(dtype="float32", **options):
        opened.append(
            Runtime(artifact_of(dtype), backend="tensorrt", device="cuda", max_sequence=32, **options)
        )
        return opened[-1]

    yield get
    for one in opened:
        one.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_case_passes_on_the_fake(name, tensorrt, artifact_of, tmp_path, monkeypatch):
    monkeypatch.setattr(CASES, "RUNS", 40)
    figures = {}
    given = {
        "tensorrt": tensorrt,
        "artifact_of": artifact_of,
        "gpu_figures": figures,
        "tmp_path": tmp_path,
        "monkeypatch": monkeypatch,
        "dtype": "float32",
    }
    case = getattr(CASES, name)
    wanted = inspect.signature(case).parameters
    case(**{one: given[one] for one in wanted})
    assert figures or "gpu_figures" not in wanted


def test_speeds_are_measured(tensorrt):
    found = CASES.speed_of(tensorrt(), 8)
    assert all(value > 0 for value in found.values() if isinstance(value, float))


def test_names_that_the_cases_use_are_there():
    path = HERE / "test_on_gpu.py"
    holders = {"runtime": Runtime, "cpu": Runtime, "eager": Runtime, "calls": calls, "cuda()": Cuda}
    for holder, owner in holders.items():
        names = walking.used([path], [holder])
        assert names, holder
        assert not walking.missing(names - set(getattr(owner, "__annotations__", ())), owner)
    engine = walking.used([path], ["engine", "runtime.engine"])
    assert engine <= {"begin", "forward", "report"}


def test_every_case_is_tried_or_left_out_by_name():
    tree = ast.parse((HERE / "test_on_gpu.py").read_text())
    there = {
        one.name for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.startswith("test_")
    }
    assert there == {*NAMES, *LEFT_OUT}
