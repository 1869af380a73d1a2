"""Packages that stand in each other's way, are too old, or lack a part."""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import distributions, requires
from typing import Final

from lmopt.cli.finding import Finding
from lmopt.registry import pip_line

_FLOOR: Final = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(?:>=|==)\s*([0-9][0-9.]*)")


def installed() -> dict[str, str]:
    """Name (lowercase, dashes) to version of every installed distribution; the first on the path counts."""
    found: dict[str, str] = {}
    for one in distributions():
        if name := one.metadata["Name"]:
            found.setdefault(_canonical(name), one.version)
    return found


def check_onnxruntime(packages: dict[str, str]) -> list[Finding]:
    """Find wheels of ONNX Runtime that overwrite each other: all are the module folder `onnxruntime`."""
    wheels = sorted(
        name for name in packages
        if name in {"onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"}
    )  # fmt: skip
    if len(wheels) < 2:
        return []
    keep = "lmopt[onnxruntime-gpu]" if "onnxruntime-gpu" in wheels else "lmopt[onnxruntime]"
    return [
        Finding(
            "packages",
            "onnxruntime",
            "broken",
            f"{' and '.join(wheels)} are installed at once and overwrite each other's files; removing one of "
            "them is not enough",
            f"{sys.executable} -m pip uninstall -y {' '.join(wheels)} && {_quoted(keep)}",
        )
    ]


def check_tensorrt(packages: dict[str, str]) -> list[Finding]:
    """Read from metadata which flavours of TensorRT are there, and whether their parts fit.

    TensorRT itself is never imported: its `Runtime` crashes the process where there is no driver.
    """
    found = []
    rtx = {name: version for name, version in packages.items() if name.startswith("tensorrt-rtx")}
    light = {n: v for n, v in packages.items() if n.startswith(("tensorrt-lean", "tensorrt-dispatch"))}
    full = {n: v for n, v in packages.items() if n.startswith("tensorrt") and n not in rtx and n not in light}
    if full:
        found.append(_full(full))
    else:
        text = "not installed; its libraries come from NVIDIA's own package index"
        found.append(Finding("accelerators", "TensorRT", "missing", text, _quoted("lmopt[tensorrt]")))
    if rtx:
        found.append(_rtx(rtx))
    else:
        text = "not installed; plain wheels, for RTX cards (compute capability 7.5 to 12.x, not 9.0 or 10.0)"
        found.append(Finding("accelerators", "TensorRT-RTX", "missing", text, _quoted("lmopt[tensorrt-rtx]")))
    if light:
        found.append(
            Finding(
                "accelerators", "TensorRT lean", "ok", f"{_list(light)}: runs finished engines, builds none"
            )
        )
    return found


def check_floors(packages: dict[str, str]) -> list[Finding]:
    """Find packages older than what lmopt's own metadata asks for: older ones have known holes."""
    found = []
    for name, floor in floors(requires("lmopt") or []).items():
        version = packages.get(name)
        if version is not None and _numbers(version) < _numbers(floor):
            line = pip_line(f'--upgrade "{name}>={floor}"')
            text = f"{version} is older than {floor}, the oldest without known defects that matter here"
            found.append(Finding("packages", name, "warning", text, line))
    return found or [Finding("packages", "versions", "ok", "none is older than lmopt asks for")]


def floors(requirements: Iterable[str]) -> dict[str, str]:
    """Read the least versions out of requirement lines.

    >>> floors(["jinja2>=3.1.6", 'torch>=2.10; extra == "torch"', 'lmopt[cuda]; extra == "gpu"'])
    {'jinja2': '3.1.6', 'torch': '2.10'}
    """
    found = {}
    for line in requirements:
        if match := _FLOOR.match(line):
            found[_canonical(match[1])] = match[2]
    return found


def _full(full: dict[str, str]) -> Finding:
    majors = {version.partition(".")[0] for version in full.values()}
    named = _list(full)
    line = pip_line('--upgrade "lmopt[tensorrt]"')
    if len(majors) > 1:
        text = f"versions {' and '.join(sorted(majors))} are mixed: {named}; one process can load one of them"
        clean = f"{sys.executable} -m pip uninstall -y {' '.join(full)}"
        return Finding("accelerators", "TensorRT", "broken", text, f"{clean} && {_quoted('lmopt[tensorrt]')}")
    bindings = any(name.endswith("-bindings") for name in full)
    if bindings and not any(name.endswith("-libs") for name in full):
        text = f"{named}: bindings without the libraries, which come from NVIDIA's own package index"
        return Finding("accelerators", "TensorRT", "broken", text, "see docs/guide/engines.md, then " + line)
    (major,) = majors
    if int(major) < 11:
        text = f"{named}: version {major} has known holes in reading engines that version 11 closed"
        return Finding("accelerators", "TensorRT", "warning", text, line)
    return Finding(
        "accelerators", "TensorRT", "ok", f"{named} (strongly typed: precision comes from the graph)"
    )


def _rtx(rtx: dict[str, str]) -> Finding:
    parts = {n: v for n, v in rtx.items() if n.endswith(("-libs", "-bindings"))}
    kinds = {name.rpartition("-")[2] for name in parts}
    if len(set(parts.values())) > 1 or kinds != {"libs", "bindings"}:
        text = f"{_list(rtx)}: libraries and bindings must both be there, in the same version"
        line = pip_line('--force-reinstall "lmopt[tensorrt-rtx]"')
        return Finding("accelerators", "TensorRT-RTX", "broken", text, line)
    return Finding("accelerators", "TensorRT-RTX", "ok", _list(rtx))


def _list(packages: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))


def _quoted(extra: str) -> str:
    return pip_line(f'"{extra}"')


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> tuple[int, ...]:
    """Numbers at the start of a version, without zeros at the end: `2.10.0+cpu` is `(2, 10)`."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
