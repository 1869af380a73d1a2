"""Facts of the machine: what this process may use, and what to print beside every figure.

In a container the number of cores says little: a quota of two CPUs on a host with 64 cores lets 64
threads start and then stops them all for most of each scheduling period. `usable_cpus` is the number
of threads that can really run at once.
"""

import math
import os
import platform as python_platform
import sys
from pathlib import Path
from typing import Any, Final

_INSTRUCTION_SETS: Final = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)

# Version 1 of control groups writes "no limit" as the largest multiple of a page below 2**63.
_NO_LIMIT: Final = 1 << 60


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Read how many CPUs the control group of this process may use.

    The least quota on the way from the process's group up to the root counts. Both cgroup versions
    are read, also where both are mounted.

    Args:
        root: Folder that holds `proc` and `sys`; for tests.

    Returns:
        CPUs, such as 1.5; `None` where no quota is set or it cannot be read.
    """
    groups = _groups(root)
    mount = root / "sys/fs/cgroup"
    quotas = []
    for folder in _upwards(mount, groups.get("", "/")):
        fields = _read(folder / "cpu.max").split()
        if len(fields) == 2:
            quotas.append(_ratio(fields[0], fields[1]))
    for controller in ("cpu", "cpu,cpuacct", "cpuacct,cpu"):
        for folder in _upwards(mount / controller, groups.get("cpu", "/")):
            quota = _read(folder / "cpu.cfs_quota_us").strip()  # -1 where none is set
            quotas.append(_ratio(quota, _read(folder / "cpu.cfs_period_us").strip()))
    return min((quota for quota in quotas if quota), default=None)


def usable_cpus(root: Path = Path("/")) -> int:
    """Count the CPUs that this process can keep busy: the least of affinity and quota, at least 1.

    Args:
        root: Folder that holds `proc` and `sys`; for tests.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = cpu_quota(root)
    # A quota of 1.5 CPUs keeps two threads busy for three quarters of the time: rounded up.
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def instruction_sets(root: Path = Path("/")) -> tuple[str, ...]:
    """List the vector instruction sets of the first CPU that matter for language models.

    Args:
        root: Folder that holds `proc`; for tests.

    Returns:
        Names as in `/proc/cpuinfo`, such as `"avx512_vnni"`; empty where that file is absent.
    """
    info = _cpuinfo(root)
    flags = set(info.get("flags", info.get("Features", "")).split())
    return tuple(name for name in _INSTRUCTION_SETS if name in flags)


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """Read the memory limit of the process's control group; `None` where none is set.

    Args:
        root: Folder that holds `proc` and `sys`; for tests.
    """
    groups = _groups(root)
    mount = root / "sys/fs/cgroup"
    folders = [(folder, "memory.max") for folder in _upwards(mount, groups.get("", "/"))]
    version_1 = _upwards(mount / "memory", groups.get("memory", "/"))
    folders += [(folder, "memory.limit_in_bytes") for folder in version_1]
    limits = [_read(folder / name).strip() for folder, name in folders]
    return min((int(limit) for limit in limits if limit.isdigit() and int(limit) < _NO_LIMIT), default=None)


def memory_total_bytes(root: Path = Path("/")) -> int | None:
    """Read how much memory this process can have: the machine's, or its control group's limit.

    Args:
        root: Folder that holds `proc` and `sys`; for tests.
    """
    known = (_meminfo(root, "MemTotal"), memory_limit_bytes(root))
    return min((one for one in known if one is not None), default=None)


def memory_available_bytes(root: Path = Path("/")) -> int | None:
    """Read how much memory this process can still take without swapping or being killed.

    The machine's available memory, or what a control group on the way up still allows if that is less.
    Pages of files that a group has not used for a while count as free: the kernel gives them back
    before it refuses anything.

    Args:
        root: Folder that holds `proc` and `sys`; for tests.

    Returns:
        Bytes; `None` where the system does not say.
    """
    groups = _groups(root)
    mount = root / "sys/fs/cgroup"
    rooms = [
        _room(folder, "memory.max", "memory.current", "inactive_file")
        for folder in _upwards(mount, groups.get("", "/"))
    ]
    rooms += [
        _room(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        for folder in _upwards(mount / "memory", groups.get("memory", "/"))
    ]
    rooms.append(_meminfo(root, "MemAvailable"))
    return min((room for room in rooms if room is not None), default=None)


def machine(root: Path = Path("/")) -> dict[str, Any]:
    """Gather the facts that belong beside every measured figure.

    Args:
        root: Folder that holds `proc` and `sys`; for tests.

    Returns:
        `cpu` (model name), `cores` (of the machine), `usable_cpus`, `cpu_quota`, `instruction_sets`,
        `memory_bytes`, `os`, `architecture` and `python`; plain values, fit for JSON.
    """
    info = _cpuinfo(root)
    return {
        "cpu": info.get("model name") or python_platform.processor() or "unknown",
        "cores": os.cpu_count() or 1,
        "usable_cpus": usable_cpus(root),
        "cpu_quota": cpu_quota(root),
        "instruction_sets": list(instruction_sets(root)),
        "memory_bytes": memory_total_bytes(root),
        "os": f"{python_platform.system()} {python_platform.release()}",
        "architecture": python_platform.machine(),
        "python": ".".join(map(str, sys.version_info[:3])),
    }


def _read(path: Path) -> str:
    """Text of a file, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _meminfo(root: Path, field: str) -> int | None:
    """A field of `/proc/meminfo` in bytes; `None` where it is absent."""
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _room(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Bytes that a control group still allows; `None` where it sets no limit."""
    most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
    if not (most.isdigit() and used.isdigit()) or int(most) >= _NO_LIMIT:
        return None
    fields = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if line.count(" ") == 1)
    return max(0, int(most) - int(used) + int(fields.get(reclaimable, 0)))


def _ratio(quota: str, period: str) -> float | None:
    """CPUs from a quota and a period in microseconds; `None` where they set no limit or make no sense."""
    if not (quota.isdigit() and period.isdigit()) or int(period) == 0:
        return None
    return int(quota) / int(period)


def _groups(root: Path) -> dict[str, str]:
    """Control group of this process by controller; cgroup version 2 has the empty name."""
    groups = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        fields = line.split(":", 2)
        if len(fields) == 3:
            groups.update(dict.fromkeys(fields[1].split(","), fields[2]))
    return groups


def _upwards(mount: Path, group: str) -> list[Path]:
    """Folders from a group up to the mount.

    Inside a container the group's path is often the host's and does not exist below the mount; the
    mount itself is then the container's own group, and it is on the list.
    """
    folder = mount.joinpath(*(part for part in group.split("/") if part not in {"", ".", ".."}))
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]


def _cpuinfo(root: Path) -> dict[str, str]:
    """Fields of the first CPU."""
    first = _read(root / "proc/cpuinfo").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
