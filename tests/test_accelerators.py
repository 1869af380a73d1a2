"""The probe: reasons where there is nothing, devices where there are some, and never an exception."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from lmopt import accelerators
from lmopt.errors import DeviceError


class Code(int):
    name = "cudaErrorInsufficientDriver"


def runtime(count: int = 2, error: int = 0, properties: int = 0) -> SimpleNamespace:
    """What `cuda.bindings.runtime` answers."""
    gpu = SimpleNamespace(name=b"H100\0", major=9, minor=0, totalGlobalMem=80 << 30, multiProcessorCount=132)
    return SimpleNamespace(
        cudaDriverGetVersion=lambda: (Code(0), 13000 if not error else 0),
        cudaRuntimeGetVersion=lambda: (Code(0), 13040),
        cudaGetDeviceCount=lambda: (Code(error), None if error else count),
        cudaGetDeviceProperties=lambda index: (Code(properties), gpu),
    )


@pytest.fixture
def bindings(monkeypatch):
    """Put something in the place of cuda-bindings; `None`: they are not installed."""

    def put(module) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)

    return put


def test_devices_of_the_runtime(bindings):
    bindings(runtime())
    state = accelerators.cuda()
    assert state.problem == ""
    assert (state.driver, state.runtime) == ("13.0", "13.4")
    assert [one.index for one in state.devices] == [0, 1]
    assert state.devices[0] == accelerators.CudaDevice(0, "H100", "9.0", 80 << 30, 132)
    assert accelerators.require_cuda("cuda").index == 0
    assert accelerators.require_cuda("cuda:1").index == 1
    with pytest.raises(DeviceError, match=r"'cuda:2' was asked for, but this machine has 2: cuda:0 \(H100\)"):
        accelerators.require_cuda("cuda:2")
    with pytest.raises(DeviceError, match="torch is a build for CPUs"):
        accelerators.require_cuda("cuda", also="torch is a build for CPUs")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (runtime(error=35), r"no usable CUDA driver: cudaErrorInsufficientDriver \(35\)"),
        (runtime(properties=35), "GPU 0 does not answer"),
        (runtime(count=0), "sees no GPU"),
        (SimpleNamespace(), "asking CUDA failed: AttributeError"),
    ],
)
def test_reasons(bindings, module, words):
    bindings(module)
    assert accelerators.cuda().devices == ()
    with pytest.raises(DeviceError, match=words):
        accelerators.require_cuda("cuda")
    line = accelerators.accelerators()[0]
    assert (line.name, line.ok) == ("CUDA", False)


def driver(start: int = 0, count: int = 1) -> SimpleNamespace:
    """What libcuda answers."""

    def put(value):
        def call(pointer, *_):
            pointer._obj.value = value
            return 0

        return call

    def name(buffer, *_):
        buffer.value = b"RTX 4090"
        return 0

    numbers = {75: 8, 76: 9}
    return SimpleNamespace(
        cuInit=lambda flags: start,
        cuDeviceGetCount=put(count),
        cuDriverGetVersion=put(12080),
        cuDeviceGet=put(0),
        cuDeviceGetName=name,
        cuDeviceTotalMem_v2=put(24 << 30),
        cuDeviceGetAttribute=lambda pointer, which, handle: put(numbers[which])(pointer),
    )


def test_the_driver_is_asked_where_bindings_are_not_installed(bindings, monkeypatch):
    bindings(None)
    monkeypatch.setattr(accelerators.ctypes, "CDLL", lambda name: driver())
    state = accelerators.cuda()
    assert state.devices == (accelerators.CudaDevice(0, "RTX 4090", "8.9", 24 << 30),)
    assert (state.driver, state.runtime) == ("12.8", "")
    monkeypatch.setattr(accelerators.ctypes, "CDLL", lambda name: driver(start=100))
    assert "does not start (error 100)" in accelerators.cuda().problem
    monkeypatch.setattr(accelerators.ctypes, "CDLL", lambda name: driver(count=0))
    assert "sees no GPU" in accelerators.cuda().problem

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(accelerators.ctypes, "CDLL", absent)
    assert "libcuda.so.1 is not found" in accelerators.cuda().problem


def test_what_is_compiled_in_is_not_what_can_start(bindings, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    (tmp_path / "onnxruntime" / "__init__.py").write_text("")
    (tmp_path / "onnxruntime" / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"")
    origin = str(tmp_path / "onnxruntime" / "__init__.py")
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        accelerators.importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(origin=origin) if name == "onnxruntime" else plain(name),
    )
    for module, ok, words in ((runtime(error=35), False, "cannot start"), (runtime(), True, "compiled in")):
        bindings(module)
        found = {one.name: one for one in accelerators.accelerators()}
        assert found["ONNX Runtime CUDA"].ok is ok
        assert words in found["ONNX Runtime CUDA"].text
        assert "not compiled into" in found["ONNX Runtime Tensorrt"].text


def test_torch_is_asked_only_if_it_is_there_already(bindings, monkeypatch):
    bindings(runtime())
    monkeypatch.setattr(accelerators, "_version", lambda name: "2.13.0" if name == "torch" else "")
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    cases = [
        (SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=cuda), True, "finds 2 CUDA devices"),
        (SimpleNamespace(version=SimpleNamespace(cuda=None), cuda=cuda), False, "a build for CPUs"),
    ]
    for module, ok, words in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "torch", module)
            (found,) = [one for one in accelerators.accelerators() if one.name == "PyTorch on CUDA"]
        assert found.ok is ok
        assert words in found.text
