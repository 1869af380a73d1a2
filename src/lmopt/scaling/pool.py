"""Run shards on processes of this machine."""

import selectors
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

from lmopt.children import Child, from_failure
from lmopt.errors import WorkerDiedError
from lmopt.scaling.inputs import Shard
from lmopt.scaling.rows import ShardResult

MOST_DEATHS: Final = 3
"""Times that a shard, or the opening of the model with no success between, may end its worker before the job stops."""
_OPENING: Final = -1  # stands for a shard's number in the count of deaths


@dataclass(eq=False)
class _Seat:
    """One place in the pool: a process, and the shard that it has, `None` while it opens the model."""

    child: Child
    shard: Shard | None = None
    rows: int = 0


def run_local(
    order: Mapping[str, Any],
    shards: Sequence[Shard],
    *,
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[ShardResult]:
    """Run shards on worker processes; one that dies is replaced and its shard is run again.

    Args:
        order: For `lmopt.scaling.worker.Worker`.
        shards: What to run.
        workers: Most processes.
        progress: Called with the rows that unfinished shards have done.

    Yields:
        Results, in the order in which they are finished.

    Raises:
        WorkerDiedError: A shard ended its worker three times, or the model cannot be opened.
        LmoptError: A worker failed with it, outside of any row.
    """
    with _Pool(order, shards, progress) as pool:
        for _ in range(min(workers, len(shards))):
            pool.hire()
        while pool.busy:
            yield from pool.wait()


class _Pool:
    def __init__(
        self, order: Mapping[str, Any], shards: Sequence[Shard], progress: Callable[[int], None]
    ) -> None:
        self._order = order
        self._waiting = deque(shards)
        self._progress = progress
        self._deaths: Counter[int] = Counter()
        self._selector = selectors.DefaultSelector()
        self._seats: set[_Seat] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for seat in self._seats:
            seat.child.end()
        self._selector.close()

    @property
    def busy(self) -> bool:
        """Whether results are still to come."""
        return bool(self._waiting) or any(seat.shard is not None for seat in self._seats)

    def hire(self) -> None:
        """Start a process and let it open the model."""
        threads = str(self._order["runtime"]["threads"])
        seat = _Seat(Child("lmopt.scaling", environment={"OMP_NUM_THREADS": threads}))
        self._seats.add(seat)
        self._selector.register(seat.child.channel.source, selectors.EVENT_READ, seat)
        with suppress(OSError):  # it died already, which the next wait finds
            seat.child.channel.send(self._order)

    def wait(self) -> Iterator[ShardResult]:
        """Wait until a worker says something."""
        for key, _ in self._selector.select():
            seat: _Seat = key.data
            frame = seat.child.channel.receive()
            if frame is None:
                self._bury(seat)
                continue
            said = frame[0]
            if said["kind"] == "failed":
                raise from_failure(said)
            if said["kind"] == "progress":
                seat.rows = said["rows"]
                self._progress(sum(one.rows for one in self._seats))
                continue
            if said["kind"] == "ready":
                self._deaths.pop(_OPENING, None)
            # The next shard first: the worker goes on while this one is written.
            self._give(seat)
            self._progress(sum(one.rows for one in self._seats))
            if said["kind"] == "done":
                yield ShardResult(said["number"], said["rows"], said["errors"])

    def _give(self, seat: _Seat) -> None:
        seat.rows = 0
        seat.shard = self._waiting.popleft() if self._waiting else None
        if seat.shard is None:
            self._dismiss(seat)
            return
        with suppress(OSError):  # it died, which the next wait finds
            seat.child.channel.send(seat.shard.to_dict())

    def _dismiss(self, seat: _Seat, grace_s: float = 0.0) -> str:
        self._selector.unregister(seat.child.channel.source)
        self._seats.remove(seat)
        return seat.child.end(grace_s)

    def _bury(self, seat: _Seat) -> None:
        """Take a dead worker's shard back and start another worker."""
        how, shard = self._dismiss(seat, grace_s=5.0), seat.shard
        key = _OPENING if shard is None else shard.number
        self._deaths[key] += 1
        if self._deaths[key] >= MOST_DEATHS:
            what = (
                "while it opened the model"
                if shard is None
                else f"in rows {shard.first_row} to {shard.first_row + shard.rows - 1} (shard {shard.number})"
            )
            raise WorkerDiedError(
                f"a worker was lost {MOST_DEATHS} times {what}; the last was {how}. If memory is short, use fewer "
                "workers; the lines above may say more. What is committed stays: the same call goes on from there."
            )
        if shard is not None:
            self._waiting.appendleft(shard)
        self.hire()
