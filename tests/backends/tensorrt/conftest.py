"""A fake GPU, and tiny models that are exported once a run for it and for the real compiler."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")

import onnx
import onnxruntime as ort
from filelock import FileLock
from onnx import TensorProto, helper

from lmopt.artifact import Artifact
from lmopt.backends.tensorrt import cuda, engine_cache, flavour, loading
from lmopt.backends.tensorrt.best import VALUES
from lmopt.backends.tensorrt.building import BuildOptions, Plan
from lmopt.backends.tensorrt.engine import open_engine
from lmopt.backends.tensorrt.preparing import prepare
from lmopt.backends.tensorrt.profiles import Profile
from lmopt.backends.tensorrt.spec import BACKEND
from lmopt.backends.torch import export_onnx
from lmopt.contracts import EngineRequest
from lmopt.registry import backends
from lmopt.testing import models
from lmopt.testing import workshop as workshops
from lmopt.types import ModelFacts, TensorSpec


def _load(name: str) -> Any:
    """Import a module that stands beside this file."""
    full = f"tensorrt_tests_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


fake_cuda = _load("fake_cuda")
fake_tensorrt = _load("fake_tensorrt")
families = _load("families")
_load("walking")
_load("test_on_gpu")
FACTS = ModelFacts(vocab_size=models.VOCAB_SIZE, context_length=models.CONTEXT_LENGTH)
MOST_PAST = models.CONTEXT_LENGTH
PROFILES = (
    Profile("prefill", (1, 1, 4), (1, 8, 16), (0, 0, MOST_PAST)),
    Profile("decode", (1, 1, 4), (1, 1, 1), (0, 32, MOST_PAST)),
)
_KINDS = {1: "float32", 7: "int64", 10: "float16", 16: "bfloat16"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the rest of the sweeps over families and types out, unless --full-sweep is given."""
    if config.getoption("--full-sweep"):
        return
    here = Path(__file__).parent
    left_out = [one for one in items if one.path.parent == here and one.get_closest_marker("slow")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [one for one in items if one not in left_out]


@pytest.fixture(scope="session")
def keep(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """Export like `lmopt.testing.workshop.export`, but each name once a run, shared by all its processes."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def export(
        module: Any, model_format: str, facts: ModelFacts, target: Path, *, dialect: str = ""
    ) -> Artifact:
        kept = root / f"tensorrt-{target.name}"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                return plain(module, model_format, facts, kept, dialect=dialect)
        return Artifact.open(kept)

    plain = workshops.export
    return export


@pytest.fixture(scope="session")
def workshop(keep: Callable[..., Artifact]) -> Iterator[workshops.Workshop]:
    """The kit's workshop, whose exports are kept."""

    class Keeping(workshops.Workshop):
        def _build(self, *key: str) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(workshops, "export", keep)
                return super()._build(*key)

    with Keeping() as one:
        yield one


@pytest.fixture(scope="session")
def exported(keep: Callable[..., Artifact], workshop: workshops.Workshop) -> Callable[[str, str], Artifact]:
    """Export a family in a precision, such as `float16+int4`."""

    def one(family: str, precision: str) -> Artifact:
        with pytest.MonkeyPatch.context() as patch:
            # Refused because of onnxruntime, which crashes on it; TensorRT does not.
            patch.setattr(export_onnx, "RECURRENT", frozenset())
            if family in workshops.MODELS and "+" not in precision:
                return workshop.subject(family, "onnx", precision).artifact
            return keep(families.make(family, precision), "onnx", FACTS, Path(f"{family}-{precision}"))

    return one


@pytest.fixture(scope="session")
def make() -> Callable[[str, str], Any]:
    """Build the module that `exported` exports."""
    return families.make


@dataclass
class Gpu:
    """The fake, put where the real one would be."""

    runtime: Any
    trt: Any
    profiles: tuple[Profile, ...] = PROFILES
    dtype: str = ""
    """Type that tensors of float32 are given instead, as an engine of that type would have them."""
    built: list[BuildOptions] = field(default_factory=list)
    folder: Path | None = None
    kept: ClassVar[dict[tuple[Path, int], Path]] = {}

    def plan_for(self, artifact, options, *, facts, device=None, again=False):
        """Stand in for the build half: a plan is the name of the graph."""
        self.built.append(options)
        record = artifact.manifest["formats"]["onnx"]
        for name in record["files"]:
            artifact.file(name)
        path = artifact.file("model.onnx")
        # As the compiler would be given it; the other types are only said to be such, and have no best of their own.
        prepared = self.prepared(path, 0 if self.dtype else options.best_logits)
        graph = onnx.load(prepared, load_external_data=False).graph
        inputs, outputs = self._specs(graph.input), self._specs(graph.output)
        grows = any("past_sequence_length" in one.shape for one in inputs)
        profiles = self.profiles
        if not grows:
            profiles = tuple(Profile(one.name, one.batch, one.sequence, (0, 0, 0)) for one in profiles)
        data = f"{path} {len(self.built)}".encode()
        dtype = self.dtype or record["dtype"]
        plan = Plan(data, "tensorrt_rtx", "1.7.1.116", inputs, outputs, profiles, dtype)
        self.trust(plan, path, half=record["dtype"] == "float16")
        return plan

    def prepared(self, path: Path, best: int) -> Path:
        """Prepare a graph as the compiler would be given it, once a run."""
        if (path, best) not in self.kept:
            self.kept[path, best] = prepare(path, Path(tempfile.mkdtemp(dir=self.folder)), best=best).path
        return self.kept[path, best]

    def trust(self, plan: Plan, path: Path, *, half: bool = False) -> None:
        """Let the fake load a plan, and run it on ONNX Runtime by the graph that it was made of, prepared."""
        best = next((int(one.shape[-1]) for one in plan.outputs if one.name == VALUES), 0)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 3
        if half:
            # onnxruntime's optimiser crashes on an LSTM in half precision.
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(
            str(self.prepared(path, best)), settings, providers=["CPUExecutionProvider"]
        )
        self.trt.plans[plan.data] = plan, session

    def _specs(self, values) -> tuple[TensorSpec, ...]:
        found = [
            TensorSpec(
                one.name,
                _KINDS[one.type.tensor_type.elem_type],
                tuple(axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim),
            )
            for one in values
        ]
        return tuple(
            replace(one, dtype=self.dtype) if self.dtype and one.dtype == "float32" else one for one in found
        )


@pytest.fixture
def device(monkeypatch, tmp_path_factory) -> Iterator[Gpu]:
    """Whatever asks for CUDA, or runs an engine, gets the fake; what builds one has the real compiler still."""
    runtime = fake_cuda.FakeRuntime()
    trt = fake_tensorrt.FakeTensorRT(runtime)
    monkeypatch.setattr(cuda, "runtime", runtime)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    monkeypatch.setattr(loading, "logger_for", lambda module: trt.log)
    found = flavour.Flavour("tensorrt_rtx", trt, "1.7.1.116")
    monkeypatch.setattr(flavour, "load", lambda name="auto": found)
    backends.register(BACKEND)
    yield Gpu(runtime, trt, folder=tmp_path_factory.getbasetemp())
    backends.unregister(BACKEND.name)
    runtime.retire()


@pytest.fixture
def gpu(device, monkeypatch) -> Gpu:
    """The fake, and a compiler that is one as well."""
    monkeypatch.setattr(engine_cache, "plan_for", device.plan_for)
    return device


@pytest.fixture
def opened(gpu, workshop):
    """Open engines on the fake; they are closed at the end."""
    engines = []

    def open_one(model: str = "llama", dtype: str = "float32", **options):
        subject = workshop.subject(model, "onnx", dtype)
        request = EngineRequest(
            facts=subject.facts,
            artifact=subject.artifact,
            device="cuda",
            dtype="auto" if gpu.dtype else dtype,
            options=options,
        )
        engines.append(open_engine(request))
        return SimpleNamespace(engine=engines[-1], subject=subject)

    yield open_one
    for one in engines:
        one.close()


@pytest.fixture
def rows():
    """Seeded token ids."""

    def draw(*lengths: int, seed: int = 0) -> list[np.ndarray]:
        random = np.random.default_rng(seed)
        return [random.integers(3, models.VOCAB_SIZE, length) for length in lengths]

    return draw


@pytest.fixture
def foreign(written) -> Callable[..., Path]:
    """Write a graph with one product of onnxruntime's own, `fused`."""

    def one(dtype: int = TensorProto.FLOAT) -> Path:
        node = helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"],
            domain="com.microsoft", name="fused", K=64, N=64, bits=4, block_size=32,
        )  # fmt: skip
        scales = np.ones(128, helper.tensor_dtype_to_np_dtype(dtype))
        return written([node], {"b": np.zeros((64, 2, 16), np.uint8), "s": scales}, dtype=dtype)

    return one


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write a graph of single nodes with the input `x` and the output `y`."""

    def one(
        nodes: list[onnx.NodeProto],
        tensors: dict[str, Any] | None = None,
        *,
        dtype: int = TensorProto.FLOAT,
        shape: tuple[Any, ...] = ("batch_size", 64),
        out: tuple[Any, ...] | None = None,
        inputs: list[onnx.ValueInfoProto] | None = None,
        out_dtype: int | None = None,
        opset: int = 21,
    ) -> Path:
        initializers = [
            value
            if isinstance(value, onnx.TensorProto)
            else onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in (tensors or {}).items()
        ]
        graph = helper.make_graph(
            nodes,
            "graph",
            inputs or [helper.make_tensor_value_info("x", dtype, shape)],
            [helper.make_tensor_value_info("y", out_dtype or dtype, out or shape)],
            initializers,
        )
        domains = {node.domain for node in nodes}
        opsets = [helper.make_opsetid(domain, 1 if domain else opset) for domain in domains | {""}]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        path = tmp_path / "model.onnx"
        onnx.save(model, path)
        return path

    return one
