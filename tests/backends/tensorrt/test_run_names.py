"""Every name that the run half uses exists in the installed libraries, with the arguments that it gives.

Nothing here runs on a GPU: that the calls *work* is for `pytest -m gpu` to show.
"""

import sys
from pathlib import Path

import cuda.bindings.runtime as runtime
import pytest
import tensorrt_rtx_bindings as trt

import lmopt.backends.tensorrt as room

ROOM = Path(room.__file__).parent


walking = sys.modules["tensorrt_tests_walking"]  # by conftest.py
RUN = {
    "contexts.py": [(("self._native",), trt.IExecutionContext)],
    "loading.py": [
        (("self._engine", "engine"), trt.ICudaEngine),
        (("self._runtime",), trt.Runtime),
        (("config",), trt.IRuntimeConfig),
        (("self._module", "trt", "flavour.module"), trt),
    ],
    "cuda.py": [(("runtime",), runtime)],
}


@pytest.mark.parametrize("file", RUN)
def test_every_name_exists(file):
    for holders, owner in RUN[file]:
        names = walking.used([ROOM / file], holders)
        assert names, f"{file} uses nothing of {holders}: has it been renamed?"
        assert not walking.missing(names, owner)


def test_a_typo_would_be_found(tmp_path):
    source = (ROOM / "contexts.py").read_text()
    assert "execute_async_v3" in source
    (tmp_path / "contexts.py").write_text(source.replace("execute_async_v3", "execute_asynch_v3"))
    names = walking.used([tmp_path / "contexts.py"], ["self._native"])
    assert walking.missing(names, trt.IExecutionContext) == ["execute_asynch_v3"]


def test_only_one_file_imports_cuda():
    importers = [one.name for one in ROOM.glob("*.py") if "cuda.bindings" in one.read_text()]
    assert importers == ["cuda.py"]


CUDA = {
    "cudaMalloc": "cudaMalloc(size_t size)",
    "cudaFree": "cudaFree(devPtr)",
    "cudaMemGetInfo": "cudaMemGetInfo()",
    "cudaSetDevice": "cudaSetDevice(int device)",
    "cudaMemcpyAsync": "cudaMemcpyAsync(dst, src, size_t count, kind: cudaMemcpyKind, stream)",
    "cudaMemcpy3DAsync": "cudaMemcpy3DAsync(cudaMemcpy3DParms p: Optional[cudaMemcpy3DParms], stream)",
    "cudaMemsetAsync": "cudaMemsetAsync(devPtr, int value, size_t count, stream)",
    "cudaHostAlloc": "cudaHostAlloc(size_t size, unsigned int flags)",
    "cudaFreeHost": "cudaFreeHost(ptr)",
    "cudaStreamCreateWithFlags": "cudaStreamCreateWithFlags(unsigned int flags)",
    "cudaStreamSynchronize": "cudaStreamSynchronize(stream)",
    "cudaStreamDestroy": "cudaStreamDestroy(stream)",
    "cudaStreamBeginCapture": "cudaStreamBeginCapture(stream, mode: cudaStreamCaptureMode)",
    "cudaStreamEndCapture": "cudaStreamEndCapture(stream)",
    "cudaGraphInstantiate": "cudaGraphInstantiate(graph, unsigned long long flags)",
    "cudaGraphLaunch": "cudaGraphLaunch(graphExec, stream)",
    "cudaGraphExecDestroy": "cudaGraphExecDestroy(graphExec)",
    "cudaGraphDestroy": "cudaGraphDestroy(graph)",
    "cudaGetErrorString": "cudaGetErrorString(error: cudaError_t)",
    "cudaGetLastError": "cudaGetLastError()",
}


def test_cuda_calls_are_pinned():
    called = {name for name in walking.used([ROOM / "cuda.py"], ["runtime"]) if name[4:5].isupper()}
    calls = {name for name in called if not isinstance(getattr(runtime, name), type | int)}
    assert calls <= set(CUDA), calls - set(CUDA)


@pytest.mark.parametrize("name", CUDA)
def test_cuda_signature(name):
    assert (getattr(runtime, name).__doc__ or "").splitlines()[0] == CUDA[name]


TENSORRT = [
    (trt.IExecutionContext.execute_async_v3, "stream_handle: typing.SupportsInt) -> bool"),
    (trt.IExecutionContext.set_tensor_address, "name: str, memory: typing.SupportsInt) -> bool"),
    (trt.IExecutionContext.set_input_shape, "name: str, shape: tuple) -> bool"),
    (trt.IExecutionContext.infer_shapes, "-> list[str]"),
    (
        trt.IExecutionContext.set_device_memory,
        "memory: typing.SupportsInt, size: typing.SupportsInt) -> None",
    ),
    (
        trt.IExecutionContext.set_optimization_profile_async,
        "profile_index: typing.SupportsInt, stream_handle: typing.SupportsInt) -> bool",
    ),
    (
        trt.ICudaEngine.create_execution_context,
        "strategy: tensorrt_rtx_bindings.tensorrt_rtx.ExecutionContextAlloc",
    ),
    (
        trt.ICudaEngine.create_execution_context,
        "runtime_config: tensorrt_rtx_bindings.tensorrt_rtx.IRuntimeConfig",
    ),
    (trt.Runtime.deserialize_cuda_engine, "serialized_engine: typing_extensions.Buffer"),
]


@pytest.mark.parametrize(("method", "part"), TENSORRT, ids=lambda one: getattr(one, "__name__", ""))
def test_tensorrt_signature(method, part):
    assert part in method.__doc__


def test_structures_of_copies_hold_what_is_put_in():
    """The box of a copy is a structure of structures: a part that is set must not be a copy that is lost."""
    box, pointer, extent = runtime.cudaMemcpy3DParms(), runtime.cudaPitchedPtr(), runtime.cudaExtent()
    pointer.ptr, pointer.pitch, pointer.xsize, pointer.ysize = 4096, 512, 100, 7
    extent.width, extent.height, extent.depth = 100, 5, 3
    box.srcPtr, box.extent = pointer, extent
    assert (int(box.srcPtr.ptr), box.srcPtr.pitch, box.srcPtr.ysize) == (4096, 512, 7)
    assert (box.extent.width, box.extent.height, box.extent.depth) == (100, 5, 3)
