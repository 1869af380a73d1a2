"""The same job on Ray gives the same files, reports nothing home and listens on this machine only."""

import json
import os
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
    rows = [{"id": n, "prompt": [n % 90 + 3, 5]} for n in range(20)] + [{"prompt": [9999]}]
    inputs = tmp_path / "in.jsonl"
    inputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job: dict[str, Any] = {"model": str(artifact), "inputs": str(inputs), "rows_per_shard": 6, "threads": 1}
    job |= {"max_new_tokens": 6, "do_sample": True}
    local = batch(**job, output=tmp_path / "local")
    driver = drivers.start(
        json.dumps({**job, "output": str(tmp_path / "ray"), "engine": "ray", "workers": 2})
    )
    seen: set[str] = set()
    while driver.poll() is None:
        seen |= listening_addresses([pid for pid in ray_processes() if pid not in before])
        time.sleep(0.3)
    assert driver.returncode == 0, driver.stderr.read()
    assert seen, "Ray was not seen to listen at all, so the next line proves nothing"
    assert seen <= LOOPBACK
    names = [path.name for path in local.shards] + ["errors.jsonl", "manifest.json"]
    for name in names:
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
