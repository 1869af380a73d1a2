"""The output folder: in which order things reach the disk, and what a full or a touched one leads to."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lmopt.errors import CorruptArtifactError, DiskFullError
from lmopt.scaling.ledger import Ledger
from lmopt.scaling.rows import ShardResult

JOB = {"model": "abc"}
ERROR = {"row": 1, "error": {"type": "InputError", "message": "bad"}, "input": "x"}
SHARDS = [ShardResult(0, ['{"row": 0}'], [ERROR]), ShardResult(1, ['{"row": 2}', '{"row": 3}'], [])]


def test_a_shard_is_on_the_disk_before_the_journal_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def name(path: Any) -> str:
        return str(Path(path).relative_to(tmp_path))

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(f"sync {name(os.readlink(f'/proc/self/fd/{descriptor}'))}")

    def renamed(source: Any, target: Any) -> None:
        replace(source, target)
        events.append(f"rename {name(target)}")

    with Ledger(tmp_path / "out") as ledger:
        ledger.take_up(JOB)
        assert (ledger.scratch / "journal.jsonl").read_bytes() == b"", "its name is not synced with job.json"
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "replace", renamed)
        ledger.commit(SHARDS[0])
        assert events == [
            "sync out/.job/part-00000.jsonl.tmp",
            "rename out/part-00000.jsonl",
            "sync out",
            "sync out/.job/journal.jsonl",
        ]
        # A shard that comes twice, as from a cluster that tries again, is committed once.
        ledger.commit(ShardResult(0, ["other"], []))
        assert len(events) == 4
    assert (tmp_path / "out" / "part-00000.jsonl").read_text() == '{"row": 0}\n'
    lines = (tmp_path / "out" / ".job" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["shard"] for line in lines] == [0]


def test_a_shard_that_is_written_but_not_in_the_journal_is_made_again(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.take_up(JOB)
        ledger.commit(SHARDS[0])
        (tmp_path / "part-00001.jsonl").write_text('{"row": 2}\n')
    with Ledger(tmp_path) as ledger:
        ledger.take_up(JOB)
        assert list(ledger.committed) == [0]
        ledger.commit(SHARDS[1])
        ledger.finish(4)
    assert (tmp_path / "part-00001.jsonl").read_text() == '{"row": 2}\n{"row": 3}\n'
    assert not (tmp_path / ".job").exists()


@pytest.mark.parametrize("change", ["remove", "alter"])
def test_errors_of_a_finished_job_are_verified_too(tmp_path: Path, change: str) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.take_up(JOB)
        for one in SHARDS:
            ledger.commit(one)
        ledger.finish(4)
    path = tmp_path / "errors.jsonl"
    path.unlink() if change == "remove" else path.write_text(path.read_text().replace("bad", "good"))
    with Ledger(tmp_path) as ledger, pytest.raises(CorruptArtifactError, match=r"errors\.jsonl"):
        ledger.take_up(JOB)


def test_a_full_disk_is_called_so_whatever_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Ledger(tmp_path) as ledger:
        ledger.take_up(JOB)
        ledger.commit(SHARDS[0])
        monkeypatch.setattr(os, "fsync", full)
        for write in (lambda: ledger.commit(SHARDS[1]), ledger.write_errors, lambda: ledger.finish(2)):
            with pytest.raises(DiskFullError):
                write()
        monkeypatch.undo()
        assert list(ledger.committed) == [0]
        assert not ledger.finished
