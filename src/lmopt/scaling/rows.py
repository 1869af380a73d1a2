"""What one shard of rows becomes: parse each row, run all of them in one batch, set the bad ones apart."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lmopt.errors import ClosedError, InputError, LmoptError, UnsupportedOptionError
from lmopt.generation import Generation, Token
from lmopt.generation.prompts import Prompt
from lmopt.generation.randomness import philox
from lmopt.runtime import Runtime

FIELDS: Final = ("prompt", "text", "messages")
"""Where a row's text is looked for, in this order."""
RESERVED: Final = ("row", "output")
_ROW_SEEDS: Final = (1 << 64) - 1
"""Sequence number of the random numbers that seed rows: no row has so many sequences."""


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What came out of a shard; rows and errors together are as many as the shard's rows.

    Attributes:
        number: The shard.
        rows: Finished rows, each one line of JSON, in the input's order.
        errors: What went wrong with the others: `row`, `error` (`type`, `message`) and `input`.
    """

    number: int
    rows: list[str]
    errors: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Task:
    """What is done with each row.

    Attributes:
        name: `"generate"` or `"score"`.
        is_json: Whether a line is a JSON object.
        field: Name of the field with the prompt; `None` takes the first of `FIELDS`.
        seed: From which each row's own seed is made.
        options: Of generation.
    """

    name: str
    is_json: bool
    field: str | None
    seed: int
    options: Mapping[str, Any]


def row_seed(seed: int, row: int) -> int:
    """Seed of a row: a function of the job's seed and the row's number, so of nothing else."""
    return philox((seed, _ROW_SEEDS), row)


def run_shard(
    runtime: Runtime,
    task: Task,
    lines: Sequence[bytes],
    *,
    number: int,
    first_row: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> ShardResult:
    """Run the rows of a shard.

    Args:
        runtime: The model.
        task: What to do.
        lines: Rows as they stand in the input.
        number: Number of the shard.
        first_row: Number of the first row.
        progress: Called with the rows of the shard that are done.

    Raises:
        UnsupportedOptionError: The options are wrong, for any row.
    """
    errors: dict[int, tuple[Exception, Any]] = {}
    records: dict[int, tuple[dict[str, Any], Prompt]] = {}
    for row, line in enumerate(lines, first_row):
        try:
            records[row] = _parse(runtime, task, line)
        except (LmoptError, ValueError, RecursionError) as error:
            errors[row] = error, line.decode(errors="replace").strip()
    batch = _Batch(runtime, task, progress)
    results = batch.run([(row, prompt) for row, (_, prompt) in records.items()])
    finished: list[str] = []
    for row, (record, _) in records.items():
        found = results[row]
        try:
            if isinstance(found, Exception):
                raise found
            finished.append(to_line({**record, "row": row, "output": found}))
        except Exception as error:
            errors[row] = error, record
    told = [
        {"row": row, "error": {"type": type(error).__name__, "message": str(error)}, "input": given}
        for row, (error, given) in sorted(errors.items())
    ]
    return ShardResult(number, finished, told)


def to_line(record: Mapping[str, Any]) -> str:
    """Write a record as one line of JSON, readable where UTF-8 can write it."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate
        line = json.dumps(record, allow_nan=False)
    return line


class _Batch:
    """Rows that are run together as long as none of them spoils it for the others."""

    def __init__(self, runtime: Runtime, task: Task, progress: Callable[[int], None]) -> None:
        self._runtime = runtime
        self._task = task
        self._progress = progress
        self._done = 0
        self._results: dict[int, Any] = {}

    def run(self, rows: list[tuple[int, Prompt]]) -> dict[int, Any]:
        """Run rows; where one makes the request fail, halves of them, until it is alone.

        What is wrong with a request is found before any work, so a bad row costs little.

        Returns:
            For each row its output, or its exception.
        """
        if not rows:
            return self._results
        before = self._done
        try:
            found = self._score(rows) if self._task.name == "score" else self._generate(rows)
        except (UnsupportedOptionError, ClosedError):
            raise
        except Exception as error:
            self._done = before
            if len(rows) == 1:
                self._results[rows[0][0]] = error
                return self._results
            half = len(rows) // 2
            self.run(rows[:half])
            return self.run(rows[half:])
        self._results.update(zip((row for row, _ in rows), found, strict=True))
        self._done = before + len(rows)
        self._progress(self._done)
        return self._results

    def _generate(self, rows: list[tuple[int, Prompt]]) -> list[Any]:
        options = dict(self._task.options)
        seeds = [row_seed(self._task.seed, row) for row, _ in rows]
        found = self._runtime.generate(
            [prompt for _, prompt in rows], seed=seeds, on_token=self._count, **options
        )
        return [_output(one) for one in found]

    def _score(self, rows: list[tuple[int, Prompt]]) -> list[Any]:
        found = self._runtime.score([prompt for _, prompt in rows])
        return [
            {"logprob": float(one.sum(dtype="float64")), "tokens": len(one), "logprobs": one.tolist()}
            for one in found
        ]

    def _count(self, token: Token) -> None:
        if token.finish_reason is not None and token.sequence == 0:
            self._done += 1
            self._progress(self._done)


def _parse(runtime: Runtime, task: Task, line: bytes) -> tuple[dict[str, Any], Prompt]:
    """Turn a line into its fields and its prompt."""
    text = line.decode("utf-8").rstrip("\r\n")
    if not task.is_json:
        return {"prompt": text}, text
    record = json.loads(text)
    to_line(record)  # NaN and numbers beyond all bounds are no JSON, and would stop whoever writes them
    if not isinstance(record, dict):
        raise InputError(f"the line is a JSON {type(record).__name__}; expected an object with a prompt")
    if taken := [name for name in RESERVED if name in record]:
        raise InputError(f"the field {taken[0]!r} is where the result goes; rename it")
    names = FIELDS if task.field is None else (task.field,)
    name = next((one for one in names if one in record), None)
    if name is None:
        raise InputError(f"the row has no field {' or '.join(names)}; it has {', '.join(record) or 'none'}")
    value = record[name]
    if name == "messages" and task.name == "generate":
        return record, runtime.chat_ids(value)
    if not isinstance(value, str | list):
        raise InputError(f"the field {name!r} is a {type(value).__name__}; expected a text or token ids")
    return record, value


def _output(found: Generation | list[Generation]) -> Any:
    if isinstance(found, list):
        outputs = [_output(one) for one in found]
        return next((one for one in outputs if isinstance(one, Exception)), outputs)
    if found.error is not None:
        return found.error
    output = {
        "text": found.text,
        "token_ids": found.token_ids,
        "finish_reason": found.finish_reason,
        "prompt_tokens": found.prompt_tokens,
        "logprobs": found.logprobs,
        "top_logprobs": found.top_logprobs,
        "score": found.score,
        "seed": found.seed,
    }
    return {name: value for name, value in output.items() if value is not None}
