"""What the machine offers: processors, memory, disk, CUDA; and the switches of what reports home."""

import ctypes
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Final

from lmopt.artifact import cache_folder
from lmopt.cli.finding import Finding
from lmopt.cli.output import size
from lmopt.platform import machine

_LITTLE_DISK: Final = 2e9
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def check_machine() -> list[Finding]:
    """Compare cores, affinity and quota; name instruction sets, memory and disk."""
    facts = machine()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else facts["cores"]
    quota, usable = facts["cpu_quota"], facts["usable_cpus"]
    counts = f"{facts['cores']} cores, {affinity} of them for this process, " + (
        "no CPU quota" if quota is None else f"a CPU quota of {quota:g}"
    )
    text = f"{facts['cpu']}: {counts}; lmopt uses {usable} threads"
    found = [Finding("machine", "processors", "ok", text)]
    for name in _THREAD_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > usable:
            text = f"{value} threads on {usable} usable processors: they would wait for each other"
            found.append(Finding("machine", name, "warning", text, f"export {name}={usable}"))
        elif value:
            found.append(Finding("machine", name, "ok", f"set to {value}"))
    sets = ", ".join(facts["instruction_sets"])
    found.append(
        Finding("machine", "instructions", "ok" if sets else "warning", sets or "none that lmopt knows of")
    )
    found.append(Finding("machine", "memory", "ok", f"{size(facts['memory_bytes'])} for this process"))
    return [*found, _disk()]


def check_cuda() -> Finding:
    """Say whether a CUDA device can be used, and if not, why; no context is made."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError):
        return _driver()
    error, count = runtime.cudaGetDeviceCount()
    if int(error) != 0:
        text = f"no usable CUDA driver: {error.name} ({int(error)}); {_kernel_module()}"
        return Finding("accelerators", "CUDA", "missing", text)
    return Finding(
        "accelerators", "CUDA", "ok" if count else "missing", f"{count} devices; {_kernel_module()}"
    )


def check_telemetry() -> list[Finding]:
    """Look at the switches of libraries that report usage, and whether lmopt came in time to set them."""
    found = []
    value = os.environ.get("ORT_DISABLE_TELEMETRY", "")
    if value == "1":
        text = "off: ORT_DISABLE_TELEMETRY=1 (lmopt sets it on import)"
        found.append(Finding("privacy", "onnxruntime", "ok", text))
    else:
        text = f"ORT_DISABLE_TELEMETRY={value}: ONNX Runtime may report usage"
        found.append(Finding("privacy", "onnxruntime", "warning", text, "unset ORT_DISABLE_TELEMETRY"))
    if "onnxruntime" in sys.modules:
        text = "onnxruntime was imported before lmopt, which reads its switch on import only"
        found.append(
            Finding(
                "privacy",
                "import order",
                "warning",
                text,
                "import lmopt first, or export ORT_DISABLE_TELEMETRY=1",
            )
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    if offline.upper() in {"1", "ON", "YES", "TRUE"}:
        found.append(
            Finding("privacy", "Hugging Face hub", "ok", f"HF_HUB_OFFLINE={offline}: never connects")
        )
    elif any(
        os.environ.get(one, "") for one in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_TELEMETRY")
    ):
        text = "connects for hub ids only, and says nothing of what it is used for"
        found.append(Finding("privacy", "Hugging Face hub", "ok", text))
    else:
        text = "connects for hub ids only, and then names its versions; HF_HUB_DISABLE_TELEMETRY=1 stops that"
        found.append(Finding("privacy", "Hugging Face hub", "ok", text))
    return found


def _disk() -> Finding:
    folder = cache_folder()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(there).free
    text = f"{folder}: {size(free)} free"
    if not os.access(there, os.W_OK):
        step = "export LMOPT_CACHE=/a/folder/of/yours"
        return Finding("machine", "cache", "broken", f"{text}, but it cannot be written", step)
    if free < _LITTLE_DISK:
        step = "export LMOPT_CACHE=/a/larger/disk"
        return Finding("machine", "cache", "warning", f"{text}: too little for most models", step)
    return Finding("machine", "cache", "ok", text)


def _driver() -> Finding:
    """Ask the driver itself, where the package cuda-bindings is not installed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding(
            "accelerators", "CUDA", "missing", f"no driver: libcuda.so.1 is not found; {_kernel_module()}"
        )
    status = driver.cuInit(0)
    count = ctypes.c_int()
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0:
        return Finding(
            "accelerators",
            "CUDA",
            "missing",
            f"the driver does not start (error {status}); {_kernel_module()}",
        )
    return Finding(
        "accelerators",
        "CUDA",
        "ok" if count.value else "missing",
        f"{count.value} devices; {_kernel_module()}",
    )


def _kernel_module() -> str:
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "the kernel has no NVIDIA module"
    return line.partition(":")[2].strip()
