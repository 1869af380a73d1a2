"""A worker process of a corpus job: opens the model once and turns shards into results."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
