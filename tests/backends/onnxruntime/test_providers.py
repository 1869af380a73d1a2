"""A provider that does not start is an error with ONNX Runtime's reason; the wheel for GPUs is not needed."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lmopt.backends.onnxruntime import providers, session
from lmopt.backends.onnxruntime.providers import CPU, CUDA, TENSORRT
from lmopt.errors import DeviceError, EngineError, UnsupportedOptionError

LINES = (
    "2026-11-24 [W:onnxruntime:Default, state.cc:747 Create] Failed to create CUDAExecutionProvider.",
    "2026-11-24 [E:onnxruntime:Default, bridge.cc:1 Get] x.cc:1 Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load "
    "library p.so with error: libcublasLt.so.13: cannot open shared object file: No such file",
)


@pytest.mark.parametrize(
    ("device", "provider", "tf32", "expected"),
    [
        ("cpu", "auto", False, [(CPU, {})]),
        ("cuda", "auto", False, [(CUDA, {"device_id": "0", "use_tf32": "0"})]),
        ("cuda:2", "cuda", True, [(CUDA, {"device_id": "2", "use_tf32": "1"})]),
        (
            "cuda",
            "tensorrt",
            False,
            [(TENSORRT, {"device_id": "0"}), (CUDA, {"device_id": "0", "use_tf32": "0"})],
        ),
    ],
)
def test_what_is_asked_for(device, provider, tf32, expected):
    assert providers.providers_for(device, provider, allow_tf32=tf32) == expected


@pytest.mark.parametrize(
    ("device", "provider", "tf32", "words"),
    [
        ("cuda", "npu", False, "provider='npu'"),
        ("cpu", "tensorrt", False, "needs device='cuda'"),
        ("cpu", "auto", True, "allow_tf32=True needs device='cuda'"),
        ("cuda", "tensorrt", False, "NVIDIA_TF32_OVERRIDE=0"),
    ],
)
def test_what_cannot_be_is_refused(device, provider, tf32, words, monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(UnsupportedOptionError, match=words):
        providers.check_options(device, provider, allow_tf32=tf32, dtype="float32")


def test_tensorrt_may_round_where_it_was_told_so_or_has_nothing_to_round(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert providers.check_options("cuda", "tensorrt", allow_tf32=True, dtype="float32") == "tensorrt"
    assert providers.check_options("cuda", "tensorrt", allow_tf32=False, dtype="float16") == "tensorrt"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert providers.check_options("cuda", "tensorrt", allow_tf32=False, dtype="float32") == "tensorrt"


def test_the_reason_is_the_library_that_is_missing():
    providers.started_or_raise("cuda", CUDA, [CUDA, CPU], LINES)
    with pytest.raises(DeviceError, match=r"gave CPUExecutionProvider: CUDAExecutionProvider did not start: Failed to "
                       r"load library p.so with error: libcublasLt.so.13"):  # fmt: skip
        providers.started_or_raise("cuda", CUDA, [CPU], LINES)
    with pytest.raises(DeviceError, match=r"made no session: .*did not start: no device"):
        providers.started_or_raise("cuda", CUDA, [], [], error=RuntimeError("no device"))
    with pytest.raises(DeviceError, match="it gave no reason"):
        providers.started_or_raise("cuda", CUDA, [CPU], [])


def test_native_lines_are_kept_and_the_descriptor_is_put_back(capfd):
    with providers.captured() as lines:
        os.write(2, b"from native code\n")
        sys.stdout.write("from Python\n")
    assert lines == ["from native code", "from Python"]
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def placed(*parts):
    """A session whose nodes are spread over providers."""
    return SimpleNamespace(
        get_provider_graph_assignment_info=lambda: [
            SimpleNamespace(
                ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=op) for op in ops]
            )
            for name, ops in parts
        ]
    )


def test_shapes_may_be_computed_on_the_cpu_and_products_may_not():
    good = placed((CUDA, ["MatMul", "Softmax"]), (CPU, ["Shape", "Gather"]), (CUDA, ["MatMul"]))
    assert providers.placement(good, "cuda") == {CUDA: 3, CPU: 2}
    bad = placed((CUDA, ["Softmax"]), (CPU, ["MatMul", "MatMul", "LSTM"]))
    with pytest.raises(DeviceError, match="would compute on the CPU: 2 MatMul, 1 LSTM"):
        providers.placement(bad, "cuda")
    assert providers.placement(bad, "cpu") == {CUDA: 1, CPU: 3}


def test_a_silent_fallback_is_an_error(opened, artifacts, monkeypatch):
    """As the wheel for GPUs does it: the provider is listed, and a session comes back without it."""
    real = session.ort
    said = {}

    def create(source, options, providers, **more):
        said["asked"] = providers
        os.write(2, LINES[1].encode() + b"\n")
        return real.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    fake = SimpleNamespace(
        **{name: getattr(real, name) for name in ("SessionOptions", "__version__")},
        get_available_providers=lambda: [TENSORRT, CUDA, CPU],
        InferenceSession=create,
    )
    monkeypatch.setattr(session, "ort", fake)
    settings = session.SessionSettings("cuda", 1)
    path = artifacts["portable"].file("model.onnx")
    with pytest.raises(DeviceError, match="libcublasLt"):
        session.create_session(path, settings)
    assert said["asked"] == [(CUDA, {"device_id": "0", "use_tf32": "0"})]

    def refuse(*_, **__):
        raise RuntimeError("this graph is not good")

    fake.InferenceSession = refuse
    with pytest.raises(EngineError, match="this graph is not good"):
        session.create_session(path, session.SessionSettings("cpu", 1))


def test_the_state_stays_where_it_is_computed(opened, monkeypatch):
    """The way of a GPU, taken on the CPU: bound outputs instead of returned ones give the same numbers."""
    plain, bound = opened("portable"), opened("portable")
    ids = np.array([[5, 6, 7, 8]])
    expected, before = plain.forward(ids, np.array([4]), plain.begin(1))

    asked = []

    class Session:
        """The session, whose outputs can be bound only; what is to stay on a GPU stays on the CPU."""

        def __getattr__(self, name):
            assert name != "run_with_ort_values"
            return getattr(session_of_cpu, name)

        def io_binding(self):
            io = session_of_cpu.io_binding()
            bind = io.bind_output

            def on_cpu(name, device="cpu", index=0):
                asked.append((name, device, index))
                bind(name, "cpu")

            io.bind_output = on_cpu
            return io

    session_of_cpu = bound._graph.session()
    monkeypatch.setattr(bound._graph, "session", Session)
    monkeypatch.setattr(type(bound._graph), "device", "cuda:3")
    given, after = bound.forward(ids, np.array([4]), bound.begin(1))
    np.testing.assert_array_equal(given, expected)
    given, _ = bound.forward(ids[:, :1], np.array([1]), after)
    monkeypatch.undo()
    expected, _ = plain.forward(ids[:, :1], np.array([1]), before)
    np.testing.assert_array_equal(given, expected)
    assert ("logits", "cpu", 0) in asked
    assert {(device, index) for name, device, index in asked if name != "logits"} == {("cuda", 3)}
