import json
import os

import pytest

from lmopt import platform

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3 GHz
flags\t\t: fpu sse2 avx avx2 fma avx512f avx512_vnni amx_tile

processor\t: 1
model name\t: Other CPU
flags\t\t: fpu avx512_bf16
"""


@pytest.fixture
def root(tmp_path):
    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        # The tighter group counts, wherever it is.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/cpu.max": "400000 100000\n",
            },
            2.0,
        ),
        # In a container /proc names the host's path, which is not there below the mount.
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/0123\n0::/docker/0123\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/g\n",
                "sys/fs/cgroup/cpu/g/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/g/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
        ({"proc/self/cgroup": "broken", "sys/fs/cgroup/cpu.max": "what\n"}, None),
        ({"proc/self/cgroup": "0::/../../x\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1.0),
    ],
)
def test_quota(root, files, quota):
    assert platform.cpu_quota(root(files)) == quota


@pytest.mark.parametrize(("limit", "usable"), [("max", 8), ("250000", 3), ("20000", 1), ("6400000", 8)])
def test_usable_cpus_is_the_least_of_affinity_and_quota(root, eight_cores, limit, usable):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{limit} 100000\n"}
    assert platform.usable_cpus(root(files)) == usable


def test_usable_cpus_without_affinity(root, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert platform.usable_cpus(root({})) == 1


def test_instruction_sets_of_the_first_cpu(root):
    found = platform.instruction_sets(root({"proc/cpuinfo": CPUINFO}))
    assert found == ("avx", "avx2", "fma", "avx512f", "avx512_vnni", "amx_tile")
    assert platform.instruction_sets(root({"proc/cpuinfo": "processor : 0\nFeatures : fp asimd i8mm\n"})) == (
        "asimd",
        "i8mm",
    )


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 4 * 1024**3),
        ({"sys/fs/cgroup/memory.max": "1073741824\n"}, 1024**3),
        ({"sys/fs/cgroup/memory.max": "max\n"}, 4 * 1024**3),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 4 * 1024**3),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n"}, 2 * 1024**3),
    ],
)
def test_memory_is_the_least_of_machine_and_limit(root, limits, expected):
    files = {"proc/meminfo": "MemTotal: 4194304 kB\nMemFree: 1 kB\n", **limits}
    assert platform.memory_total_bytes(root(files)) == expected


def test_machine_is_plain_and_true(root):
    facts = platform.machine(root({"proc/cpuinfo": CPUINFO, "proc/meminfo": "MemTotal: 1024 kB\n"}))
    assert facts["cpu"] == "Some CPU @ 3 GHz"
    assert facts["memory_bytes"] == 1024**2
    assert json.loads(json.dumps(facts)) == facts


def test_this_machine():
    facts = platform.machine()
    assert 1 <= facts["usable_cpus"] <= facts["cores"]
    assert facts["cpu_quota"] is None or facts["cpu_quota"] > 0


MEMINFO = "MemTotal:       1000 kB\nMemAvailable:    600 kB\n"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 600 * 1024),
        # A group that has no limit changes nothing; one with a limit leaves what it has not used.
        (
            {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
            600 * 1024,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "100000\n",
                "sys/fs/cgroup/a/memory.current": "70000\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
            },
            30000,
        ),
        # Pages of files that nobody uses are given back before anything is refused.
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "100000\n",
                "sys/fs/cgroup/memory.current": "90000\n",
                "sys/fs/cgroup/memory.stat": "anon 50000\ninactive_file 20000\n",
            },
            30000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "5000\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "9000\n",
            },
            0,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "9000\n",
            },
            600 * 1024,
        ),
    ],
)
def test_available_memory_is_what_machine_and_groups_leave(root, files, available):
    assert platform.memory_available_bytes(root(files)) == available
