"""Run a piece of work in a process of its own, within limits of time and memory, and say how it ended."""

import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from lmopt.children import Child
from lmopt.evaluation import peak_memory_bytes

Progress = Callable[[str, int, int], None]
Kind = Literal["error", "crash", "memory", "time", "budget", "interrupted"]

_LOOK_S: Final = 0.05
_LAST_LINES: Final = 3
_OWN_TALK: Final = ("Traceback", "  File", "    ")


class WorkError(Exception):
    """A piece of work did not come to its end.

    Attributes:
        kind: What stopped it.
        seconds: How long it had run.
    """

    def __init__(self, kind: Kind, reason: str, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.kind = kind
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Limits:
    """What a piece of work may use.

    Attributes:
        seconds: Time.
        memory_bytes: Resident memory of its process; `None` sets no limit.
    """

    seconds: float
    memory_bytes: int | None = None


class Runner(Protocol):
    """Runs a piece of work; tests put another in its place."""

    def __call__(
        self, call: str, arguments: Mapping[str, Any], limits: Limits, tell: Progress
    ) -> dict[str, Any]:
        """Give what the work gave, or raise `WorkError`."""
        ...


@dataclass(frozen=True, slots=True)
class InProcess:
    """Runs work in fresh processes.

    Attributes:
        log: File that takes what they write to stderr; it begins anew with each.
    """

    log: Path

    def __call__(
        self, call: str, arguments: Mapping[str, Any], limits: Limits, tell: Progress
    ) -> dict[str, Any]:
        """Run `module:function` on plain arguments in a fresh process.

        Args:
            call: Function that takes the arguments by name and `tell`, and gives plain data.
            arguments: Plain data.
            limits: What it may use; a process that passes them is killed.
            tell: Told of its progress.

        Raises:
            WorkError: It raised, died, or was killed.
        """
        began = time.monotonic()
        threads = arguments.get("threads")
        variables = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        with self.log.open("wb") as errors:
            child = Child("lmopt.tuning", environment=variables, stderr=errors)
            try:
                child.channel.send({"call": call, "arguments": dict(arguments)})
                return self._wait(child, limits, began, tell)
            except OSError:
                return self._died(child, began)
            finally:
                child.end()

    def _wait(self, child: Child, limits: Limits, began: float, tell: Progress) -> dict[str, Any]:
        process = child.process.pid
        while True:
            ready, _, _ = select.select([child.channel.source], [], [], _LOOK_S)
            spent = time.monotonic() - began
            if ready:
                frame = child.channel.receive()
                if frame is None:
                    return self._died(child, began)
                said = frame[0]
                if said["kind"] == "done":
                    result: dict[str, Any] = said["result"]
                    return {**result, "seconds": spent}
                if said["kind"] == "failed":
                    kind: Kind = "memory" if "Memory" in said["type"] else "error"
                    raise WorkError(kind, f"{said['type']}: {said['message']}", spent)
                tell(said["stage"], said["done"], said["total"])
            most = limits.memory_bytes
            if most is not None and (used := peak_memory_bytes(process)) > most:
                raise WorkError(
                    "memory",
                    f"it took {used / 1e6:,.0f} MB of memory; the limit is {most / 1e6:,.0f} MB",
                    spent,
                )
            if spent > limits.seconds:
                raise WorkError("time", f"it took more than {limits.seconds:.0f} s", spent)

    def _died(self, child: Child, began: float) -> dict[str, Any]:
        how = child.end(grace_s=5.0)
        kind: Kind = "crash"
        if how == "killed by SIGKILL":
            kind, how = "memory", "killed by SIGKILL, most likely by the system because memory was short"
        words = self.last_words()
        raise WorkError(
            kind, f"its process ended: {how}" + (f" ({words})" if words else ""), time.monotonic() - began
        )

    def last_words(self) -> str:
        """Give the last lines that the process wrote to stderr, without tracebacks."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line.strip() for line in lines if line.strip() and not line.startswith(_OWN_TALK)]
        return " | ".join(kept[-_LAST_LINES:])[-400:]
