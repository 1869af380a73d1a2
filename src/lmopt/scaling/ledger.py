"""The output folder of a corpus job: shards appear in it once, whole, and are known to be there.

A shard is committed by a line in the journal, which is written and synced after the shard's file is in its
place. The line also holds the shard's errors, so that rows and errors cannot part. What a killed driver left
behind is either in the journal or as if it had never been.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from lmopt import __version__
from lmopt.artifact import durable
from lmopt.artifact.hashing import file_hash
from lmopt.artifact.space import disk_full, free_bytes, means_full
from lmopt.errors import (
    ArtifactExistsError,
    BatchError,
    CorruptArtifactError,
    JobMismatchError,
    LockTimeoutError,
)
from lmopt.scaling.rows import ShardResult, to_line

MANIFEST: Final = "manifest.json"
ERRORS: Final = "errors.jsonl"
SCRATCH: Final = ".job"
_SCHEMA: Final = 1


class Ledger:
    """What a job's folder holds; use it as a context manager.

    Args:
        folder: The output folder, which is made if need be.

    Attributes:
        folder: The output folder.
        scratch: Folder in it for what the job needs while it runs.
        committed: Journal lines of the committed shards, by number.
        finished: Whether the job is done: its manifest is there.

    Raises:
        ArtifactExistsError: The folder holds something else.
        LockTimeoutError: Another process is at work in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / SCRATCH
        self.committed: dict[int, dict[str, Any]] = {}
        durable.make_folders(folder)
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise LockTimeoutError(
                f"another process runs a job in {folder}; wait for it or choose another folder"
            ) from error
        self.finished = (folder / MANIFEST).is_file()
        if not self.finished and not self.scratch.is_dir() and os.listdir(folder):
            self.close()
            raise ArtifactExistsError(
                f"{folder} holds files that no corpus job of lmopt wrote. Choose another folder, or empty it first."
            )
        if not self.finished:
            self.scratch.mkdir(exist_ok=True)
            durable.sync(folder)

    def take_up(self, job: Mapping[str, Any]) -> None:
        """Begin a job, or go on with it after proving that it is the one that began here.

        Args:
            job: What the results depend on, as plain data.

        Raises:
            JobMismatchError: Another job is here; the differences are named.
            CorruptArtifactError: A committed shard is not what was written.
        """
        self._job = json.loads(json.dumps(job))
        known = self._known_job()
        if known is None:
            # Before the synced file beside it, so that a loss of power cannot take the journal's own name.
            (self.scratch / "journal.jsonl").touch()
            self._put(self.scratch / "job.json", [json.dumps(self._job, indent=1)])
        elif known != self._job:
            raise JobMismatchError(
                f"{self.folder} holds another job ({_differences(known, self._job)}). Ask for the same, or choose "
                "another output folder."
            )
        entries = self._manifest()["shards"] if self.finished else list(self._journal())
        if self.finished and (told := self._manifest().get("errors_file")):
            self._is_there(told)
        for entry in entries:
            if self._is_there(entry):
                self.committed[entry["shard"]] = entry

    def commit(self, result: ShardResult) -> None:
        """Put a shard into the folder, whole and once.

        Raises:
            DiskFullError: The disk is full; what was committed before is there.
        """
        if result.number in self.committed:
            return
        name = shard_name(result.number)
        digest, size = self._put(self.folder / name, result.rows)
        entry = {
            "shard": result.number,
            "file": name,
            "rows": len(result.rows),
            "bytes": size,
            "sha256": digest,
            "errors": result.errors,
        }
        try:
            with (self.scratch / "journal.jsonl").open("ab") as journal:
                journal.write((to_line(entry) + "\n").encode())
                journal.flush()
                os.fsync(journal.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self.committed[result.number] = entry

    def write_errors(self, more: Sequence[Mapping[str, Any]] = ()) -> int:
        """Write `errors.jsonl` from what is known so far; where there is none, there is no file.

        Args:
            more: Errors of a shard that was not committed.

        Returns:
            Number of the errors.

        Raises:
            DiskFullError: The disk is full; the file is as it was.
        """
        told = [*self.errors(), *more]
        path = self.folder / ERRORS
        if told:
            self._put(path, [to_line(one) for one in sorted(told, key=lambda one: one["row"])])
        else:
            path.unlink(missing_ok=True)
        return len(told)

    def errors(self) -> list[dict[str, Any]]:
        """Errors of the committed shards, in order."""
        if self.finished:
            path = self.folder / ERRORS
            return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        return [one for number in sorted(self.committed) for one in self.committed[number]["errors"]]

    def finish(self, rows: int) -> None:
        """Count, write the manifest, and remove what only a running job needs.

        Raises:
            BatchError: Rows got lost or came twice, which is a defect of lmopt.
        """
        if self.finished:
            return
        entries = [self.committed[number] for number in sorted(self.committed)]
        told = self.write_errors()
        out = sum(entry["rows"] for entry in entries)
        if out + told != rows:
            raise BatchError(f"{rows} rows went in, {out} came out and {told} failed: please report this")
        manifest: dict[str, Any] = {
            "schema": _SCHEMA,
            "created_by": f"lmopt {__version__}",
            "job": self._job,
            "rows_in": rows,
            "rows_out": out,
            "errors": told,
            "shards": [{**entry, "errors": len(entry["errors"])} for entry in entries],
        }
        if told:
            digest, size = file_hash(self.folder / ERRORS)
            manifest["errors_file"] = {"file": ERRORS, "bytes": size, "sha256": digest}
        self._put(self.folder / MANIFEST, [json.dumps(manifest, indent=1)])
        shutil.rmtree(self.scratch, ignore_errors=True)

    def close(self) -> None:
        """Let others work in the folder."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        """Give the ledger itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of the folder."""
        self.close()

    def _known_job(self) -> dict[str, Any] | None:
        if self.finished:
            found: dict[str, Any] = self._manifest()["job"]
            shutil.rmtree(self.scratch, ignore_errors=True)  # left by a kill right after the manifest
            return found
        try:
            known: dict[str, Any] = json.loads((self.scratch / "job.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return known

    def _manifest(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            _ = found["job"], found["shards"]
        except (ValueError, KeyError) as error:
            raise CorruptArtifactError(
                f"{self.folder / MANIFEST} is no manifest of a corpus job: {error}. Choose another folder."
            ) from error
        return found

    def _journal(self) -> Iterator[dict[str, Any]]:
        """Give the journal's lines; what a killed driver left half-written is cut off."""
        path = self.scratch / "journal.jsonl"
        whole = 0
        try:
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    yield json.loads(line)
        except FileNotFoundError:
            return
        except ValueError as error:
            raise CorruptArtifactError(
                f"{path} is damaged ({error}). Remove {self.folder} and start anew."
            ) from error
        if whole < path.stat().st_size:
            os.truncate(path, whole)

    def _is_there(self, entry: Mapping[str, Any]) -> bool:
        """Prove that a committed shard is what was written; one that was removed is made again."""
        path = self.folder / entry["file"]
        if not path.exists() and not self.finished:
            return False
        if not path.exists() or file_hash(path) != (entry["sha256"], entry["bytes"]):
            raise CorruptArtifactError(
                f"{path} is not what was committed: it was changed or removed. Put it back; or remove "
                f"{self.folder / MANIFEST if self.finished else path} and ask again, "
                f"{'in an empty folder' if self.finished else 'and it is made again'}."
            )
        return True

    def _put(self, path: Path, lines: Sequence[str]) -> tuple[str, int]:
        """Write a file so that it is there whole or not at all; return its hash and size."""
        content = "".join(line + "\n" for line in lines).encode()
        temporary = self.scratch / f"{path.name}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            durable.sync(path.parent)
        except OSError as error:
            raise self._failed(error) from error
        return hashlib.sha256(content).hexdigest(), len(content)

    def _failed(self, error: OSError) -> Exception:
        if means_full(error):
            return disk_full(self.folder, 1, free_bytes(self.folder))
        return BatchError(f"{self.folder} cannot be written: {error}. What is committed stays.")


def shard_name(number: int) -> str:
    """Name of a shard's file.

    >>> shard_name(12)
    'part-00012.jsonl'
    """
    return f"part-{number:05d}.jsonl"


def _differences(known: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> str:
    """Name what differs between two jobs, with both values."""
    told = []
    for name in sorted({*known, *asked}):
        there, here = known.get(name), asked.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            told += [_differences(there, here, f"{prefix}{name}.")] if there != here else []
        elif there != here:
            told.append(f"{prefix}{name}: {json.dumps(there)} there, {json.dumps(here)} asked")
    return "; ".join(told)
