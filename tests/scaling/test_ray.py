"""The same job on Ray gives the same files, a killed worker or not, reports nothing home and listens here only."""

import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lmopt.scaling import batch

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def ray_processes() -> list[str]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if "ray" in Path(f"/proc/{name}/cmdline").read_text():
                    found.append(name)
            except OSError:
                pass
    return found


def actors(pids: list[str]) -> list[str]:
    """Those among them in which models run."""
    found = []
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::MapWorker"):
                found.append(pid)
        except OSError:
            pass
    return found


def listening_addresses(pids: list[str]) -> set[str]:
    inodes = set()
    for pid in pids:
        try:
            targets = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        inodes |= {one[8:-1] for one in targets if one.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].split(":")[0])
    return found


@pytest.mark.skipif(find_spec("ray") is None, reason='Ray is not installed: pip install "lmopt[parallel]"')
def test_ray_writes_the_files_that_local_processes_write(
    artifact: Path, tmp_path: Path, drivers: Any
) -> None:
    before = set(ray_processes())
    rows = [{"id": n, "prompt": [n % 90 + 3, 5]} for n in range(300)] + [{"prompt": [9999]}]
    inputs = tmp_path / "in.jsonl"
    inputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job: dict[str, Any] = {"model": str(artifact), "inputs": str(inputs), "rows_per_shard": 6, "threads": 1}
    job |= {"max_new_tokens": 40, "do_sample": True}
    local = batch(**job, output=tmp_path / "local")
    driver = drivers.start(
        json.dumps({**job, "output": str(tmp_path / "ray"), "engine": "ray", "workers": 2})
    )
    # Its first line says that workers are in the midst of shards.
    journal = tmp_path / "ray" / ".job" / "journal.jsonl"
    seen: set[str] = set()
    killed = ""
    while driver.poll() is None:
        mine = [pid for pid in ray_processes() if pid not in before]
        seen |= listening_addresses(mine)
        if not killed and journal.is_file() and journal.stat().st_size and (victims := actors(mine)):
            killed = victims[0]
            os.kill(int(killed), signal.SIGKILL)
        time.sleep(0.05)
    assert driver.returncode == 0, driver.stderr.read()
    assert killed, "no worker was seen, so the files below prove nothing about a lost one"
    assert seen, "Ray was not seen to listen at all, so the next line proves nothing"
    assert seen <= LOOPBACK
    names = [path.name for path in local.shards] + ["errors.jsonl", "manifest.json"]
    for name in names:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
