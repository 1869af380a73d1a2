"""A worker process of a corpus job: opens the model once and turns shards into results."""

import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lmopt import errors
from lmopt.errors import EngineError, LmoptError
from lmopt.runtime import Runtime
from lmopt.scaling.inputs import Shard, read_shard
from lmopt.scaling.rows import ShardResult, Task, run_shard


class Worker:
    """A model that is open, and what to do with rows.

    Args:
        order: `source`, `runtime` (options of `lmopt.Runtime`), `task` (fields of `Task`) and `inputs` (the
            file); plain data.
    """

    def __init__(self, order: Mapping[str, Any]) -> None:
        self._runtime = Runtime(order["source"], **order["runtime"])
        self._task = Task(**order["task"])
        self._inputs = Path(order["inputs"])

    def run(self, shard: Shard, progress: Callable[[int], None] = lambda rows: None) -> ShardResult:
        """Turn a shard into its result."""
        return run_shard(
            self._runtime,
            self._task,
            read_shard(self._inputs, shard),
            number=shard.number,
            first_row=shard.first_row,
            progress=progress,
        )


def as_failure(error: Exception) -> dict[str, str]:
    """Write an error that ends the job as plain data."""
    if not isinstance(error, LmoptError):
        traceback.print_exception(error, file=sys.stderr)
    return {"type": type(error).__name__, "message": str(error)}


def from_failure(failure: Mapping[str, str]) -> LmoptError:
    """Make an error again from what `as_failure` wrote."""
    kind = getattr(errors, failure["type"], None)
    if isinstance(kind, type) and issubclass(kind, LmoptError):
        return kind(failure["message"])
    return EngineError(f"a worker failed: {failure['type']}: {failure['message']}")
