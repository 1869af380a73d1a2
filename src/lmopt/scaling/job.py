"""Corpus jobs: run a model over many rows, on many processes, each row exactly once."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lmopt.artifact import Artifact
from lmopt.errors import InputError, LmoptError, TooManyErrorsError, UnsupportedOptionError
from lmopt.generation import GenerationConfig
from lmopt.model import Model
from lmopt.platform import usable_cpus
from lmopt.scaling.inputs import Inputs, Shard, index, spool
from lmopt.scaling.ledger import ERRORS, Ledger
from lmopt.scaling.pool import run_local
from lmopt.scaling.rows import ShardResult
from lmopt.scaling.source import resolve

TASKS: Final = ("generate", "score")
ENGINES: Final = ("local", "ray")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What a corpus job left behind.

    Attributes:
        folder: The output folder.
        shards: Its files of finished rows, in the input's order.
        rows_in: Rows of the input.
        rows_out: Finished rows.
        errors: Rows that failed; `rows_in == rows_out + errors`.
        resumed_rows: Rows that an earlier call had done.
        seconds: Time that this call took, the opening of the model included.
    """

    folder: Path
    shards: tuple[Path, ...]
    rows_in: int
    rows_out: int
    errors: int
    resumed_rows: int
    seconds: float

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read the finished rows, in the input's order."""
        for path in self.shards:
            yield from _read(path)

    def error_rows(self) -> Iterator[dict[str, Any]]:
        """Read the failed rows: `row`, `error` and `input`."""
        path = self.folder / ERRORS
        if path.exists():
            yield from _read(path)


def batch(
    model: str | os.PathLike[str] | Model | Artifact,
    inputs: str | os.PathLike[str] | Iterable[Any],
    output: str | os.PathLike[str],
    *,
    task: Literal["generate", "score"] = "generate",
    engine: Literal["local", "ray"] = "local",
    workers: int = 1,
    rows_per_shard: int = 256,
    max_errors: int = 100,
    field: str | None = None,
    seed: int = 0,
    backend: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    threads: int | None = None,
    trust: bool = False,
    runtime: Mapping[str, Any] | None = None,
    address: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> BatchResult:
    """Run a model over many rows and write the results as shards, each exactly once.

    A job that was stopped, by an error, Ctrl-C or `kill -9`, goes on from its last committed shard when it
    is called again with the same arguments; `workers`, `threads`, `engine` and `max_errors` may differ. A
    finished one returns at once.

    Each row of the output has the fields of the input, `row` (its number) and `output`: for `"generate"`
    `text`, `token_ids`, `finish_reason`, `prompt_tokens` and what else was asked for (a list of these with
    `num_return_sequences` above 1); for `"score"` `logprobs` of the second to last token, `logprob`, their
    sum, and `tokens`, their number. A row that fails goes to `errors.jsonl` instead.

    Args:
        model: As for `lmopt.Runtime`; on several machines a path that all of them have.
        inputs: A `.jsonl` file with one object a line, whose `prompt`, `text` or `messages` is read and
            whose other fields are passed through; any other file has a prompt a line. Or an iterable of
            texts, rows of token ids, or mappings.
        output: Folder for the results: `part-00000.jsonl` and so on, `errors.jsonl`, and `manifest.json`
            with hashes and counts, which is written last.
        task: `"generate"` or `"score"`.
        engine: `"local"`: processes of this machine; `"ray"`: an actor pool of Ray Data.
        workers: Processes, each with a model of its own. One uses all CPUs by its threads; several take
            more memory and, with small models, less time.
        rows_per_shard: Rows that are run in one batch and committed together.
        max_errors: Most rows that may fail; with one more the job stops.
        field: Name of the field to read instead.
        seed: From which each row's own seed is made, so that sampled text depends on neither `workers`
            nor what ran before.
        backend: As for `lmopt.Runtime`.
        device: As for `lmopt.Runtime`.
        dtype: As for `lmopt.Runtime`.
        threads: Threads of each worker; `None` divides the CPUs among the workers.
        trust: As for `lmopt.Runtime`.
        runtime: More options of `lmopt.Runtime`, its limits and the backend's own.
        address: Of a running Ray cluster; `None` starts Ray on this machine, for this call.
        progress: Called with the stage's name, the steps done and their total; while rows are run the
            stage is `"rows"`.
        **options: Fields of `lmopt.GenerationConfig`, for `"generate"`.

    Returns:
        What is in the folder.

    Raises:
        JobMismatchError: The folder holds another job.
        TooManyErrorsError: More than `max_errors` rows failed; `errors.jsonl` has all that are known.
        WorkerDiedError: A shard killed its worker three times.
        UnsupportedOptionError: An option is unknown or not possible.
        NotInstalledError: Ray or the engine is missing.
        CorruptArtifactError: A committed shard, or the input, was changed since.
        DiskFullError: The disk is full; what is committed stays.
    """
    began = time.perf_counter()
    tell = progress or (lambda stage, done, total: None)
    _check(task, engine, workers, rows_per_shard, max_errors, options, runtime or {})
    with Ledger(Path(os.path.abspath(output))) as ledger:
        rows = _inputs(inputs, ledger, rows_per_shard, tell)
        source = resolve(
            model,
            backend=backend,
            device=device,
            dtype=dtype,
            trust=trust,
            scratch=ledger.scratch,
            progress=tell,
        )
        what = {"name": task, "is_json": rows.is_json, "field": field, "seed": seed, "options": options}
        how = {"backend": backend, "device": device, "dtype": dtype, **(runtime or {})}
        ledger.take_up(
            {
                "model": source.identity,
                "inputs": rows.sha256,
                "rows": rows.rows,
                "rows_per_shard": rows_per_shard,
                "task": what,
                "runtime": how,
            }
        )
        share = threads or max(1, usable_cpus() // workers)
        order = {
            "source": source.place,
            "runtime": {**how, "threads": share, "trust": trust},
            "task": what,
            "inputs": str(rows.path),
        }
        resumed = sum(rows.shards[number].rows for number in ledger.committed)
        _run(ledger, rows, order, engine, workers, max_errors, address, tell)
        ledger.finish(rows.rows)
        return BatchResult(
            folder=ledger.folder,
            shards=tuple(
                ledger.folder / ledger.committed[number]["file"] for number in sorted(ledger.committed)
            ),
            rows_in=rows.rows,
            rows_out=sum(entry["rows"] for entry in ledger.committed.values()),
            errors=len(ledger.errors()),
            resumed_rows=resumed,
            seconds=time.perf_counter() - began,
        )


def _run(
    ledger: Ledger,
    rows: Inputs,
    order: Mapping[str, Any],
    engine: str,
    workers: int,
    max_errors: int,
    address: str | None,
    tell: Progress,
) -> None:
    """Run what is not committed and commit it; whatever happens, `errors.jsonl` says what is known."""
    todo = [one for one in rows.shards if one.number not in ledger.committed]
    failed, done = len(ledger.errors()), rows.rows - sum(one.rows for one in todo)
    if failed > max_errors:
        raise _too_many(ledger, failed, max_errors)
    if not todo:
        return
    tell("rows", done, rows.rows)

    def count(running: int) -> None:
        tell("rows", done + running, rows.rows)

    try:
        for result in _engine(engine, order, todo, workers, address, count):
            failed += len(result.errors)
            if failed > max_errors:
                ledger.write_errors(result.errors)
                raise _too_many(ledger, failed, max_errors)
            ledger.commit(result)
            done += len(result.rows) + len(result.errors)
            count(0)
    except TooManyErrorsError:
        raise
    except BaseException:
        with suppress(LmoptError):  # a disk that is full must not hide what happened
            ledger.write_errors()
        raise


def _engine(
    name: str,
    order: Mapping[str, Any],
    todo: Sequence[Shard],
    workers: int,
    address: str | None,
    progress: Callable[[int], None],
) -> Iterator[ShardResult]:
    if name == "local":
        return run_local(order, todo, workers=workers, progress=progress)
    from lmopt.scaling.ray_pool import run_ray

    return run_ray(order, todo, workers=workers, address=address)


def _too_many(ledger: Ledger, failed: int, most: int) -> TooManyErrorsError:
    return TooManyErrorsError(
        f"{failed} rows failed, {most} may: see {ledger.folder / ERRORS}. What is committed stays. Mend the rows "
        "and start in another folder, or allow more (max_errors) and call again."
    )


def _inputs(inputs: Any, ledger: Ledger, rows_per_shard: int, tell: Progress) -> Inputs:
    """Find the file of rows; an iterable becomes one."""
    if isinstance(inputs, str | os.PathLike):
        return index(Path(os.path.abspath(inputs)), rows_per_shard, progress=tell)
    if not isinstance(inputs, Iterable):
        raise InputError(f"inputs is a {type(inputs).__name__}; expected a file or an iterable of rows")
    ledger.scratch.mkdir(exist_ok=True)
    path = ledger.scratch / "inputs.jsonl"
    spool(inputs, path)
    return index(path, rows_per_shard, progress=tell)


def _check(
    task: str,
    engine: str,
    workers: int,
    rows_per_shard: int,
    max_errors: int,
    options: Mapping[str, Any],
    runtime: Mapping[str, Any],
) -> None:
    for name, value, known in (("task", task, TASKS), ("engine", engine, ENGINES)):
        if value not in known:
            raise UnsupportedOptionError(f"{name}={value!r} is not known; choose one of {', '.join(known)}")
    for name, number, least in (
        ("workers", workers, 1),
        ("rows_per_shard", rows_per_shard, 1),
        ("max_errors", max_errors, 0),
    ):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise UnsupportedOptionError(
                f"{name}={number!r} is not possible; expected a whole number >= {least}"
            )
    if task == "score" and options:
        raise UnsupportedOptionError(
            f"{sorted(options)[0]!r} is an option of generation; task='score' has none"
        )
    GenerationConfig.from_options(None, **options)
    try:
        json.dumps([dict(options), dict(runtime)])
    except TypeError as error:
        raise UnsupportedOptionError(f"an option cannot be handed to other processes: {error}") from error


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line)
