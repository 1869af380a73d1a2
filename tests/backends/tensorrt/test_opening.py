"""From an artefact to an engine: the real compiler's plan on the fake GPU, and what is refused before it is asked."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from lmopt.accelerators import cuda
from lmopt.backends.tensorrt import engine_cache
from lmopt.backends.tensorrt.engine import open_engine
from lmopt.contracts import EngineRequest
from lmopt.errors import DeviceError, EngineError, UnsafeArtifactError, UnsupportedError

OPTIONS = {"flavour": "tensorrt_rtx", "max_batch": 2, "max_sequence": 16}


def request_of(subject, dtype="float32", **options):
    return EngineRequest(
        facts=subject.facts,
        artifact=subject.artifact,
        device="cuda",
        dtype=dtype,
        options={**OPTIONS, **options},
    )


@pytest.fixture
def compiled(device, workshop, monkeypatch, tmp_path):
    """Open the tiny LSTM by a plan that the real compiler has made, which the fake runs by the graph."""
    monkeypatch.setenv("LMOPT_CACHE", str(tmp_path / "cache"))
    subject = workshop.subject("lstm", "onnx", "float32")
    real, plans, engines = engine_cache.plan_for, [], []

    def plan_for(artifact, *arguments, **more):
        plans.append(real(artifact, *arguments, **more))
        device.trust(plans[-1], artifact.file("model.onnx"))
        return plans[-1]

    def opened(**options):
        engines.append(open_engine(request_of(subject, **options)))
        return engines[-1]

    monkeypatch.setattr(engine_cache, "plan_for", plan_for)
    yield SimpleNamespace(open=opened, plans=plans, subject=subject, device=device)
    for one in engines:
        one.close()


def test_a_plan_of_the_real_compiler_is_what_the_engine_needs(compiled):
    engine = compiled.open()
    (plan,) = compiled.plans
    assert plan.targets == ("8.9",)  # the fake's
    assert len(plan.data) > 10_000
    ids = np.arange(5, 15)[None]
    logits, _ = engine.forward(ids, np.array([10]), engine.begin(1))
    np.testing.assert_allclose(logits[0], compiled.subject.reference(ids[0]), rtol=1e-3, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.open().report().details["plan"]["from_cache"]


def test_a_cached_plan_that_is_refused_is_built_again_once(compiled, monkeypatch):
    compiled.open()
    plain, seen = compiled.device.trt.load, []

    def refuse_the_first(data):
        seen.append(data)
        return plain(data) if len(seen) > 1 else compiled.device.trt.log.lines.append("serial number") or None

    monkeypatch.setattr(compiled.device.trt, "load", refuse_the_first)
    with pytest.warns(RuntimeWarning, match=r"built again: .*cannot load the plan.*serial number") as caught:
        healed = compiled.open()
    assert len(caught) == 1
    assert not healed.report().details["plan"]["from_cache"]
    assert [one.from_cache for one in compiled.plans] == [False, True, False]
    assert compiled.open().report().details["plan"]["from_cache"]


def test_a_plan_that_is_refused_twice_is_an_error(compiled, monkeypatch):
    compiled.open()
    monkeypatch.setattr(compiled.device.trt, "load", lambda data: None)
    with (
        pytest.warns(RuntimeWarning, match="built again"),
        pytest.raises(EngineError, match="cannot load the plan"),
    ):
        compiled.open()
    assert [one.from_cache for one in compiled.plans] == [False, True, False]


def test_somebody_elses_plan_is_opened_where_it_is_trusted_by_name(compiled, tmp_path):
    compiled.open()
    path = tmp_path / "model.plan"
    engine_cache.save_plan(compiled.plans[0], path)
    with pytest.raises(UnsafeArtifactError, match="trust_engine=True"):
        compiled.open(engine=path)
    engine = compiled.open(engine=path, trust_engine=True)
    assert engine.report().details["plan"]["from_cache"]
    assert len(compiled.plans) == 1  # nothing was compiled for it


def test_an_engine_that_loads_with_errors_in_the_log_is_refused(opened, gpu, monkeypatch):
    plain = gpu.trt.load
    monkeypatch.setattr(
        gpu.trt, "load", lambda data: (gpu.trt.log.lines.append("bad checksum"), plain(data))[1]
    )
    with pytest.raises(EngineError, match="bad checksum"):
        opened()


def test_a_wrong_type_is_refused_before_anything_is_compiled(gpu, workshop):
    request = request_of(workshop.subject("lstm", "onnx", "float32"), dtype="float16")
    with pytest.raises(UnsupportedError, match="computes in float32; asked for float16"):
        open_engine(request)
    assert gpu.built == []


@pytest.mark.skipif(not cuda().problem, reason="this machine has a GPU")
def test_without_a_gpu_the_probe_answers_and_nothing_is_compiled(workshop, monkeypatch, tmp_path):
    monkeypatch.setenv("LMOPT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DeviceError, match=r"'cuda' was asked for, but there is no"):
        open_engine(request_of(workshop.subject("lstm", "onnx", "float32")))
    assert not (tmp_path / "cache").exists()
