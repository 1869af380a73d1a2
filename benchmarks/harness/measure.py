"""Time programs in turn, on a machine that others may use too."""

import fcntl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from harness.texts import Workload
from harness.worker import Worker, WorkerError, busy_s
from lmopt.evaluation import Lap, Speed
from lmopt.platform import usable_cpus


@dataclass(frozen=True)
class Conditions:
    """How careful to be.

    Attributes:
        rounds: Laps of each program.
        quiet: Largest share of the machine's CPU time that others may take while a lap runs.
        retries: How often a lap is repeated that was disturbed more; the least disturbed one counts.
        lock: Held while laps run, so that measurements of several people do not meet.
    """

    rounds: int = 3
    quiet: float = 0.05
    retries: int = 4
    lock: "Lock" = field(default_factory=lambda: Lock(None))


@dataclass
class Measured:
    """What came out for one program.

    Attributes:
        laps: One a round.
        disturbed: Share of CPU time that others took during each.
        tokens: New tokens by number of the prompt, of all attempts.
        problem: Why there is no more.
    """

    laps: list[Lap] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    tokens: dict[int, list[list[int]]] = field(default_factory=dict)
    problem: str | None = None

    @property
    def speed(self) -> Speed | None:
        """Summary of the laps."""
        return Speed.of(self.laps) if self.laps else None


def measure(
    workers: Mapping[str, Worker],
    workload: Workload,
    ids: Sequence[int],
    conditions: Conditions,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Measured]:
    """Time programs round by round in turn; the order is reversed every other round.

    While one is timed, the others are stopped: idle threads of some of them spin. Before each lap the
    program generates a few tokens, to be as warm as it would be by itself.

    Args:
        workers: Programs by name.
        workload: What a lap does.
        ids: Text that the prompts are cut from.
        conditions: How careful to be.
        progress: Told what is going on.
    """
    found = {name: Measured() for name in workers}
    for worker in workers.values():
        worker.pause()
    for number in range(conditions.rounds):
        order = list(workers) if number % 2 == 0 else list(workers)[::-1]
        for name in order:
            if found[name].problem is not None:
                continue
            progress(f"{workload.name}: round {number + 1}/{conditions.rounds}, {name}")
            workers[name].resume()
            try:
                _round(workers[name], workload, ids, number, conditions, found[name])
            except WorkerError as error:
                found[name].problem = str(error)
            if workers[name].process.poll() is None:
                workers[name].pause()
    return found


def _round(
    worker: Worker,
    workload: Workload,
    ids: Sequence[int],
    number: int,
    conditions: Conditions,
    found: Measured,
) -> None:
    attempts: list[tuple[float, Lap]] = []
    for attempt in range(1 + conditions.retries):
        # A program that remembers prompts must not meet one again.
        prompt = number + attempt * conditions.rounds
        prompts = workload.prompts(ids, prompt)
        conditions.lock.hold()
        worker.lap([list(ids[-24:])] * len(prompts), 8)
        began, used, busy = time.perf_counter(), worker.cpu_s, busy_s()
        lap = worker.lap(prompts, workload.new_tokens)
        others = busy_s() - busy - (worker.cpu_s - used)
        share = max(0.0, others) / ((time.perf_counter() - began) * usable_cpus())
        found.tokens[prompt] = lap.tokens.tolist()
        attempts.append((share, lap))
        if share <= conditions.quiet:
            break
    share, lap = min(attempts, key=lambda one: one[0])
    found.laps.append(lap)
    found.disturbed.append(share)


class Lock:
    """A lock on a file, which `flock` of the shell knows too, held for a few minutes at a time.

    Args:
        file: `None` locks nothing.
        most_s: Seconds after which it is given up for a moment, at the next `hold`.
    """

    def __init__(self, file: Path | None, most_s: float = 150.0) -> None:
        self._file, self._most_s = file, most_s
        self._opened: TextIO | None = None
        self._since = 0.0

    def hold(self) -> None:
        """Have it from here on; call it before each lap."""
        if self._file is None:
            return
        if self._opened is not None and time.monotonic() - self._since > self._most_s:
            self.release()
            time.sleep(1.0)  # the others' turn
        if self._opened is None:
            self._opened = self._file.open("a")
            fcntl.flock(self._opened, fcntl.LOCK_EX)
            self._since = time.monotonic()

    def release(self) -> None:
        """Give it up; harmless where it is not held."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
