"""A program that is timed, in a process of its own, and the orders it takes (`peers/protocol.py`)."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from harness.candidates import Candidate
from lmopt.evaluation import Lap, peak_memory_bytes, reset_peak, resident_memory_bytes
from lmopt.platform import usable_cpus

PEERS = Path(__file__).parents[1] / "peers"
_TICK = os.sysconf("SC_CLK_TCK")


class WorkerError(RuntimeError):
    """A program did not do what it was told."""


class Worker:
    """One candidate with one setting, running.

    Args:
        candidate: What to run.
        setting: `threads`, and options of its adapter.
        log: Where its stderr goes.
        before_start: Called in the new process, to give it a priority.
    """

    def __init__(
        self,
        candidate: Candidate,
        setting: dict[str, Any],
        log: Path,
        *,
        before_start: Callable[[], None] | None = None,
    ) -> None:
        self.candidate, self.setting = candidate, setting
        self._log = log.open("ab")
        self._began = time.perf_counter()
        self.process = subprocess.Popen(
            [str(candidate.python), str(PEERS / candidate.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # some start helpers, which are stopped and ended with them
            preexec_fn=before_start,
        )
        try:
            found = self.ask("import")
            self.versions: dict[str, str] = found["versions"]
            self.import_s: float = found["seconds"]
            self.imported_bytes = resident_memory_bytes(self.process.pid)
            options = {**candidate.options, **setting}
            threads = options.pop("threads", None)
            found = self.ask("load", path=str(candidate.path), threads=threads, options=options)
            self.load_s: float = found["seconds"]
            self.settings: dict[str, Any] = found["settings"]
        except BaseException:
            self.close()
            raise

    def ask(self, order: str, **details: Any) -> dict[str, Any]:
        """Give an order and wait for its reply.

        Raises:
            WorkerError: The program said what is wrong, or is gone.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": order, **details}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise WorkerError(f"ended at {order!r} with status {self.process.wait()}; see {self._log.name}")
        reply: dict[str, Any] = json.loads(line)
        if "problem" in reply:
            raise WorkerError(reply["problem"])
        return reply

    def timed(self, order: str, **details: Any) -> tuple[dict[str, Any], float]:
        """Give an order; give its reply, and the share of the machine's CPU time that others took meanwhile."""
        used, busy = self.cpu_s, busy_s()
        found = self.ask(order, **details)
        others = busy_s() - busy - (self.cpu_s - used)
        return found, max(0.0, others) / (found["seconds"] * usable_cpus())

    def lap(self, prompts: list[list[int]], new_tokens: int) -> Lap:
        """Generate once."""
        found = self.ask("generate", prompts=prompts, new_tokens=new_tokens)
        return Lap(
            tuple(map(len, prompts)),
            np.array(found["tokens"], np.int64),
            np.array(found["stamps_ns"], np.int64),
        )

    def first_token(self, prompt: list[int]) -> dict[str, float]:
        """Generate for the first time; call it once, on a fresh worker.

        Returns:
            `load_to_first_token_s` without the imports, `process_to_first_token_s` with everything.
        """
        stamps = self.lap([prompt], 2).stamps_ns
        rest = (stamps[0, 1] - stamps[0, 0]) / 1e9
        return {
            "import_s": self.import_s,
            "load_to_first_token_s": self.load_s + stamps[0, 0] / 1e9,
            "process_to_first_token_s": time.perf_counter() - self._began - rest,
        }

    def logits(self, ids: list[int], file: Path) -> None:
        """Write the logits after each id, `(sequence, vocab)` float32, to an `.npy` file."""
        self.ask("logits", ids=ids, file=str(file))

    def pause(self) -> None:
        """Stop every thread of it, so that none spins while another program is timed."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def relax(self) -> None:
        """Give every thread of it the usual priority: what is not timed should not hold up others."""
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))

    @property
    def cpu_s(self) -> float:
        """CPU time that it has used."""
        # The fields behind the name, which may hold anything: user and system time are the 12th and 13th.
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    @property
    def peak_bytes(self) -> int:
        """Most memory that it has held since the last reset."""
        return peak_memory_bytes(self.process.pid)

    def reset_peak(self) -> bool:
        """Measure the peak afresh; whether that is possible."""
        return reset_peak(self.process.pid)

    def close(self) -> None:
        """End it."""
        # Nothing of it is to be kept, and some engines hang when they are taken down.
        self._signal(signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def __enter__(self) -> Self:
        """Give the worker."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.close()


def in_turn(workers: Mapping[str, Worker], rounds: int) -> Iterator[tuple[int, str, Worker]]:
    """Let stopped programs go on in turn, round by round, in the other order every other round.

    Yields:
        Number of the round, name of the program, and the program, which is stopped again afterwards.
    """
    for number in range(rounds):
        for name in list(workers) if number % 2 == 0 else list(workers)[::-1]:
            workers[name].resume()
            yield number, name, workers[name]
            workers[name].pause()


def real_time() -> None:
    """Give this process the real-time class."""
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def busy_s() -> float:
    """CPU time that all processes of the machine together have used, and that its host has taken."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    idle = int(fields[3]) + int(fields[4])
    return (sum(map(int, fields[:8])) - idle) / _TICK
