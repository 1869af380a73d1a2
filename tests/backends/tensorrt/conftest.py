"""A fake GPU, and tiny models compiled for it."""

import gc
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")

import onnxruntime as ort

from lmopt.backends.tensorrt import cuda, engine_cache, flavour, loading
from lmopt.backends.tensorrt.building import BuildOptions, Plan
from lmopt.backends.tensorrt.engine import open_engine
from lmopt.backends.tensorrt.profiles import Profile
from lmopt.backends.tensorrt.spec import BACKEND
from lmopt.contracts import EngineRequest
from lmopt.registry import backends
from lmopt.testing import models
from lmopt.testing.workshop import Workshop
from lmopt.types import TensorSpec


def _load(name: str) -> Any:
    """Import a module that stands beside this file."""
    full = f"tensorrt_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


fake_gpu = _load("fake_gpu")
_KINDS = {1: "float32", 7: "int64", 10: "float16", 16: "bfloat16"}
MOST_PAST = models.CONTEXT_LENGTH
PROFILES = (
    Profile("prefill", (1, 1, 4), (1, 8, 16), (0, 0, MOST_PAST)),
    Profile("decode", (1, 1, 4), (1, 1, 1), (0, 32, MOST_PAST)),
)


@dataclass
class Gpu:
    """The fake, put where the real one would be."""

    runtime: Any
    trt: Any
    profiles: tuple[Profile, ...] = PROFILES
    built: list[BuildOptions] = field(default_factory=list)

    def plan_for(self, artifact, options, *, facts, device=None):
        """Stand in for the build half: a plan is the name of the graph."""
        import onnx

        self.built.append(options)
        record = artifact.manifest["formats"]["onnx"]
        for name in record["files"]:
            artifact.file(name)
        path = artifact.file("model.onnx")
        graph = onnx.load(path, load_external_data=False).graph
        inputs, outputs = _specs(graph.input), _specs(graph.output)
        grows = any("past_sequence_length" in one.shape for one in inputs)
        profiles = self.profiles
        if not grows:
            profiles = tuple(Profile(one.name, one.batch, one.sequence, (0, 0, 0)) for one in profiles)
        data = f"{path} {len(self.built)}".encode()
        plan = Plan(data, "tensorrt_rtx", "1.7.1.116", inputs, outputs, profiles, record["dtype"])
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        if record["dtype"] == "float16":
            # onnxruntime's optimiser crashes on an LSTM in half precision.
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        self.trt.plans[data] = plan, session
        return plan


def _specs(values) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            one.name,
            _KINDS[one.type.tensor_type.elem_type],
            tuple(axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim),
        )
        for one in values
    )


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    """Whatever asks for CUDA or TensorRT gets the fake."""
    runtime = fake_gpu.FakeRuntime()
    trt = fake_gpu.FakeTensorRT(runtime)
    found = Gpu(runtime, trt)
    monkeypatch.setattr(cuda, "runtime", runtime)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    monkeypatch.setattr(engine_cache, "plan_for", found.plan_for)
    monkeypatch.setattr(
        flavour, "load", lambda name="auto": flavour.Flavour("tensorrt_rtx", trt, "1.7.1.116")
    )
    monkeypatch.setattr(loading, "logger_for", lambda module: trt.log)
    backends.register(BACKEND)
    yield found
    backends.unregister(BACKEND.name)
    gc.collect()
    fake_gpu.FORMER.update(runtime.blocks)


@pytest.fixture(scope="session")
def workshop():
    with Workshop() as one:
        yield one


@pytest.fixture
def opened(gpu, workshop):
    """Open engines on the fake; they are closed at the end, and nothing may be left on the device."""
    engines = []

    def open_one(model: str = "llama", dtype: str = "float32", **options):
        subject = workshop.subject(model, "onnx", dtype)
        request = EngineRequest(
            facts=subject.facts, artifact=subject.artifact, device="cuda", dtype=dtype, options=options
        )
        engines.append(open_engine(request))
        return SimpleNamespace(engine=engines[-1], subject=subject)

    yield open_one
    for one in engines:
        one.close()


@pytest.fixture
def rows():
    """Seeded token ids."""

    def make(*lengths: int, seed: int = 0) -> list[np.ndarray]:
        random = np.random.default_rng(seed)
        return [random.integers(3, models.VOCAB_SIZE, length) for length in lengths]

    return make
