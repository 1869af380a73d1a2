"""Which accelerators this process can use, and why it cannot use the others.

Nothing here makes a context, imports a framework, or touches TensorRT: its `Runtime` ends the process where
there is no driver, so that this module has to be asked first.
"""

import ctypes
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from lmopt.errors import DeviceError

_ORT_LIBRARIES: Final = {
    "CUDAExecutionProvider": "providers_cuda",
    "TensorrtExecutionProvider": "providers_tensorrt",
}
_TENSORRT_MODULES: Final = {
    "tensorrt": "builds and runs engines",
    "tensorrt_rtx": "builds and runs engines, on RTX cards",
    "tensorrt_rtx_bindings": "builds and runs engines, on RTX cards",
    "tensorrt_lean": "runs finished engines, builds none",
    "tensorrt_dispatch": "runs finished engines, builds none",
}


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One GPU.

    Attributes:
        index: `1` for the device `"cuda:1"`.
        name: What its maker calls it.
        compute_capability: Such as `"8.9"`.
        memory_bytes: All of its memory.
        multiprocessors: Number of them; 0 where it was not to be found out.
    """

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    multiprocessors: int = 0


@dataclass(frozen=True, slots=True)
class Cuda:
    """State of CUDA on this machine.

    Attributes:
        devices: Usable GPUs.
        problem: Why there is none; empty where there is one.
        driver: Newest CUDA version that the driver supports, such as `"13.0"`; empty where there is no driver.
        runtime: CUDA version of the installed cuda-bindings; empty where they are not installed.
        kernel_module: What the kernel's NVIDIA module calls itself.
    """

    devices: tuple[CudaDevice, ...] = ()
    problem: str = ""
    driver: str = ""
    runtime: str = ""
    kernel_module: str = ""


@dataclass(frozen=True, slots=True)
class Usable:
    """One way to compute on an accelerator.

    Attributes:
        name: What it is.
        ok: Whether it can be used, as far as can be told without using it.
        text: What there is, or why it cannot be used.
    """

    name: str
    ok: bool
    text: str


def cuda() -> Cuda:
    """Look for usable GPUs of NVIDIA; raises nothing."""
    module = _kernel_module()
    try:
        runtime: Any = importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError):
        runtime = None
    try:
        return _by_driver(module) if runtime is None else _by_runtime(runtime, module)
    except Exception as error:  # whatever a broken installation raises is the answer
        return Cuda(problem=f"asking CUDA failed: {type(error).__name__}: {error}", kernel_module=module)


def require_cuda(device: str, *, also: str = "") -> CudaDevice:
    """Give the GPU that a device string names.

    Args:
        device: `"cuda"` (the first) or `"cuda:<index>"`.
        also: What else is known to be in the way, for the message.

    Raises:
        DeviceError: It is not usable; the message has the reason.
    """
    state = cuda()
    kind, _, index = device.partition(":")
    number = int(index or 0)
    if kind == "cuda" and not also and number < len(state.devices):
        return state.devices[number]
    reasons = [reason for reason in (also, state.problem) if reason]
    if not reasons:
        names = ", ".join(f"cuda:{one.index} ({one.name})" for one in state.devices)
        reasons = [f"this machine has {len(state.devices)}: {names}"]
    raise DeviceError(
        f"device {device!r} was asked for, but {'; '.join(reasons)}. Use device='cpu' on a backend that has "
        "it, or see `lmopt doctor`"
    )


def accelerators() -> list[Usable]:
    """List everything that could compute on an accelerator here: CUDA, and what stands on it.

    Frameworks are judged by what is known without importing them, except those that this process has
    imported already, which are asked.
    """
    state = cuda()
    return [_cuda_line(state), *_torch(state), *_onnxruntime(state), *_tensorrt(state)]


def _cuda_line(state: Cuda) -> Usable:
    if state.problem:
        return Usable("CUDA", False, f"{state.problem}; {state.kernel_module}")
    devices = "; ".join(
        f"cuda:{one.index} is {one.name}, compute capability {one.compute_capability}, "
        f"{one.memory_bytes / (1 << 30):.1f} GiB"
        for one in state.devices
    )
    return Usable("CUDA", True, f"{devices}; driver for CUDA {state.driver or 'unknown'}")


def _torch(state: Cuda) -> list[Usable]:
    has = _version("torch")
    if not has:
        return []
    torch = sys.modules.get("torch")
    name = "PyTorch on CUDA"
    if "+cpu" in has or (torch is not None and torch.version.cuda is None):
        return [Usable(name, False, f"torch {has} is a build for CPUs")]
    if torch is not None:
        ok = bool(torch.cuda.is_available())
        return [
            Usable(name, ok, f"torch {has} finds {torch.cuda.device_count() if ok else 'no'} CUDA devices")
        ]
    return [
        Usable(name, not state.problem, f"torch {has}; {state.problem or 'not imported yet, so not asked'}")
    ]


def _onnxruntime(state: Cuda) -> list[Usable]:
    """Tell providers that are compiled in from those that can start: `get_available_providers` lists the former."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return []
    libraries = [one.name for one in (Path(spec.origin).parent / "capi").glob("*onnxruntime_providers_*")]
    found = []
    for provider, part in _ORT_LIBRARIES.items():
        name = f"ONNX Runtime {provider.removesuffix('ExecutionProvider')}"
        if not any(part in library for library in libraries):
            found.append(Usable(name, False, "not compiled into the installed wheel"))
        elif state.problem:
            found.append(Usable(name, False, f"compiled in, and cannot start: {state.problem}"))
        else:
            found.append(
                Usable(name, True, "compiled in; whether its libraries load shows when a session is made")
            )
    return found


def _tensorrt(state: Cuda) -> list[Usable]:
    """List flavours of TensorRT by what can be found of them without importing any."""
    found = []
    for module, can in _TENSORRT_MODULES.items():
        if importlib.util.find_spec(module) is None:
            continue
        blocked = f"; runs nothing here: {state.problem}" if state.problem else ""
        found.append(Usable(module, not state.problem, f"{can}{blocked}"))
    return found


def _by_runtime(runtime: Any, module: str) -> Cuda:
    """Ask CUDA's runtime, through cuda-bindings."""
    _, supports = runtime.cudaDriverGetVersion()
    _, own = runtime.cudaRuntimeGetVersion()
    versions: dict[str, Any] = {"driver": _cuda_version(supports), "runtime": _cuda_version(own)}
    error, count = runtime.cudaGetDeviceCount()
    if int(error) != 0:
        problem = f"there is no usable CUDA driver: {error.name} ({int(error)})"
        return Cuda(problem=problem, kernel_module=module, **versions)
    devices = []
    for index in range(count):
        error, found = runtime.cudaGetDeviceProperties(index)
        if int(error) != 0:
            problem = f"GPU {index} does not answer: {error.name} ({int(error)})"
            return Cuda(problem=problem, kernel_module=module, **versions)
        devices.append(
            CudaDevice(
                index=index,
                name=_text(found.name),
                compute_capability=f"{found.major}.{found.minor}",
                memory_bytes=int(found.totalGlobalMem),
                multiprocessors=int(found.multiProcessorCount),
            )
        )
    return Cuda(
        tuple(devices), "" if devices else "the CUDA driver sees no GPU", kernel_module=module, **versions
    )


def _by_driver(module: str) -> Cuda:
    """Ask the driver itself, where cuda-bindings are not installed."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Cuda(problem="there is no CUDA driver: libcuda.so.1 is not found", kernel_module=module)
    number = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number))
    if status:
        return Cuda(problem=f"the CUDA driver does not start (error {status})", kernel_module=module)
    count = number.value
    driver.cuDriverGetVersion(ctypes.byref(number))
    supports = _cuda_version(number.value)
    devices = []
    for index in range(count):
        handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(handle), index)
        driver.cuDeviceGetName(name, 256, handle)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
        # Numbers of CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, of CUDA's driver API.
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, handle)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle)
        capability = f"{major.value}.{minor.value}"
        devices.append(CudaDevice(index, _text(name.value), capability, size.value))
    problem = "" if devices else "the CUDA driver sees no GPU"
    return Cuda(tuple(devices), problem, driver=supports, kernel_module=module)


def _cuda_version(number: int | None) -> str:
    """Write 13040, as CUDA counts, as 13.4; nothing where there is no driver."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _text(name: bytes | str) -> str:
    return name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else name


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _kernel_module() -> str:
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "the kernel has no NVIDIA module"
    return line.partition(":")[2].strip()
