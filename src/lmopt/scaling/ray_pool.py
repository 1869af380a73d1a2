"""Run shards on an actor pool of Ray Data, on this machine or on a cluster."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from lmopt.children import as_failure, from_failure
from lmopt.errors import DeviceError, NotInstalledError, WorkerDiedError
from lmopt.registry import pip_line
from lmopt.scaling.inputs import Shard
from lmopt.scaling.rows import ShardResult
from lmopt.scaling.worker import Worker
from lmopt.spec import Requirement

_LOOPBACK: Final = "127.0.0.1"


def run_ray(
    order: Mapping[str, Any], shards: Sequence[Shard], *, workers: int, address: str | None
) -> Iterator[ShardResult]:
    """Run shards on Ray actors; Ray replaces those that die.

    Args:
        order: For `lmopt.scaling.worker.Worker`.
        shards: What to run.
        workers: Actors.
        address: Of a running cluster; `None` uses the Ray that this process is connected to, or starts
            one on this machine for the time being.

    Yields:
        Results, in the order in which they are finished.

    Raises:
        NotInstalledError: Ray is missing.
        DeviceError: The cluster cannot be reached.
        WorkerDiedError: Ray gave a shard up.
        LmoptError: A worker failed with it, outside of any row.
    """
    ray = _ray(address)
    workers, threads = min(workers, len(shards)), int(order["runtime"]["threads"])
    started = _connect(ray, address, cpus=workers * threads)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        todo = ray.data.from_items(
            [{"shard": json.dumps(one.to_dict())} for one in shards], override_num_blocks=len(shards)
        )
        gpus = 1 if str(order["runtime"]["device"]).startswith("cuda") else None
        results = todo.map(
            _Actor,
            fn_constructor_args=[dict(order)],
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=gpus,
        )
        for row in results.iter_rows():
            said = json.loads(row["result"])
            if "failure" in said:
                raise from_failure(said["failure"])
            yield ShardResult(**said)
    except ray.exceptions.RayError as error:
        raise WorkerDiedError(
            f"Ray gave up: {type(error).__name__}: {str(error).strip().splitlines()[-1]}. What is committed stays: "
            "the same call goes on from there."
        ) from error
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """A worker inside Ray: errors travel as data, so that their types survive."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self._worker: Worker | None = None
        self._failure: dict[str, str] = {}
        try:
            self._worker = Worker(order)
        except Exception as error:
            self._failure = as_failure(error)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Run one shard."""
        if self._worker is None:
            return {"result": json.dumps({"failure": self._failure})}
        try:
            result = self._worker.run(Shard(**json.loads(str(row["shard"]))))
        except Exception as error:
            return {"result": json.dumps({"failure": as_failure(error)})}
        told = {"number": result.number, "rows": result.rows, "errors": result.errors}
        return {"result": json.dumps(told)}


def _ray(address: str | None) -> Any:
    """Import Ray with everything off that reports home, and bound to this machine unless a cluster is asked for."""
    if not Requirement("ray", "").is_met():
        extra = pip_line('"lmopt[parallel]"')
        raise NotInstalledError(f"engine='ray' needs Ray, which this Python lacks: {extra}")
    # Read when Ray is first imported.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    if address is None:
        # The one switch that lets a local Ray use the loopback address, on Linux as well.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray
    import ray.data

    return ray


def _connect(ray: Any, address: str | None, *, cpus: int) -> bool:
    """Connect to a cluster, or start Ray here; return whether it was done, and is to be undone."""
    if ray.is_initialized():
        return False
    quiet = {"configure_logging": True, "logging_level": logging.ERROR, "log_to_driver": False}
    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {
            "address": "local", "num_cpus": cpus, "include_dashboard": False, "_node_ip_address": _LOOPBACK,
        }  # fmt: skip
    # Ray waits 30 s, no more, for its own processes, which a busy machine may exceed: a second chance.
    for last in (address is not None, True):
        try:
            ray.init(**where, **quiet)
            break
        except Exception as error:  # Ray raises plain ones as well
            ray.shutdown()
            if last:
                raise DeviceError(
                    f"Ray cannot be reached or started ({address or 'local'}): {error}"
                ) from error
    return True
