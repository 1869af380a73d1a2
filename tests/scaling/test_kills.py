"""`kill -9` a worker, then the driver, at random times: nothing lost, nothing twice, nothing done again."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lmopt.scaling import batch

ROWS = 480
BAD = {7, 100, 333}


def write_inputs(path: Path) -> None:
    rows = ({"id": f"r{n}", "prompt": [9999] if n in BAD else [n % 90 + 3, 5, 7]} for n in range(ROWS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def journal(folder: Path) -> list[dict[str, Any]]:
    """Committed shards: whole lines of the journal."""
    try:
        lines = (folder / ".job" / "journal.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


@pytest.mark.slow
def test_every_row_comes_out_once_whatever_is_killed(
    artifact: Path, tmp_path: Path, drivers: Any, watch: Any, full_sweep: bool
) -> None:
    inputs = tmp_path / "in.jsonl"
    write_inputs(inputs)
    job = {"model": str(artifact), "inputs": str(inputs), "rows_per_shard": 8, "workers": 2, "threads": 1}
    job |= {"max_new_tokens": 24, "do_sample": True}
    whole = batch(**job, output=tmp_path / "whole")
    wanted = [path.read_bytes() for path in whole.shards]
    for run in range(10 if full_sweep else 2):
        chance, folder = random.Random(run), tmp_path / f"killed-{run}"
        order = json.dumps({**job, "output": str(folder)})
        driver = drivers.start(order)
        assert watch.wait_until(lambda pid=driver.pid: len(watch.children_of(pid)) == 2)
        time.sleep(chance.uniform(0.0, 1.0))
        if victims := watch.children_of(driver.pid):
            victim = chance.choice(victims)
            os.kill(victim, signal.SIGKILL)
        start = len(journal(folder))
        # Somewhere between here and the end: whatever moment that is, the next call must cope.
        watch.wait_until(lambda n=start, d=folder: len(journal(d)) > n, 20.0)
        time.sleep(chance.uniform(0.0, 0.5))
        workers = watch.children_of(driver.pid)
        driver.kill()
        driver.wait()
        assert watch.wait_until(lambda pids=workers: not any(map(watch.alive, pids)), 5.0), "orphans"
        before = {entry["file"]: identity(folder / entry["file"]) for entry in journal(folder)}
        assert (folder / "manifest.json").exists() or before, "killed too early to prove anything"

        found = batch(**job, output=folder)
        assert (found.rows_in, found.rows_out, found.errors) == (ROWS, ROWS - len(BAD), len(BAD))
        assert {file: identity(folder / file) for file in before} == before, (
            "a committed shard was made again"
        )
        assert [path.read_bytes() for path in found.shards] == wanted
        assert [row["row"] for row in found.rows()] == [n for n in range(ROWS) if n not in BAD]
        assert [row["row"] for row in found.error_rows()] == sorted(BAD)


def test_a_shard_that_kills_its_workers_stops_the_job(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmopt.errors import WorkerDiedError
    from lmopt.scaling import pool

    class Doomed(pool.Child):
        """Dies as soon as it is given a shard."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            send = self.channel.send

            def deadly(header: Any, *rest: Any) -> None:
                if header.get("number") == 1:
                    self.process.kill()
                    self.process.wait()
                send(header, *rest)

            self.channel.send = deadly  # type: ignore[method-assign]

    monkeypatch.setattr(pool, "Child", Doomed)
    rows = [[5, 6, 7]] * 6
    job: dict[str, Any] = {"rows_per_shard": 2, "max_new_tokens": 2}
    with pytest.raises(WorkerDiedError, match=r"3 times in rows 2 to 3 \(shard 1\).*SIGKILL"):
        batch(artifact, rows, tmp_path / "out", **job)
    monkeypatch.undo()
    found = batch(artifact, rows, tmp_path / "out", **job)
    assert (found.rows_out, found.resumed_rows) == (6, 2)
