"""What the machine offers: processors, memory, disk, CUDA; and the switches of what reports home."""

import os
import shutil
import sys
from typing import Final

from lmopt.accelerators import accelerators
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


def check_accelerators() -> list[Finding]:
    """Say what can compute on a GPU here, and why the rest cannot; no context is made."""
    return [
        Finding("accelerators", one.name, "ok" if one.ok else "missing", one.text) for one in accelerators()
    ]


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
