"""The processes of a split model as one: ask all, hear all, and end all when one is lost."""

import selectors
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from lmopt.children import Child, from_failure
from lmopt.errors import ClosedError, EngineError, LmoptError, WorkerDiedError
from lmopt.types import AnyArray

_PATIENCE_S: Final = 20.0
"""Time that the other ranks have to answer after one has failed."""

Answer = tuple[dict[str, Any], list[AnyArray]]


class Ranks:
    """Processes that do the same at the same time.

    Args:
        module: What they run.
        variables: Environment of each.

    Attributes:
        pids: Their process numbers.
    """

    def __init__(self, module: str, variables: Sequence[Mapping[str, str]]) -> None:
        self._ranks = [Child(module, environment=one) for one in variables]
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._ranks)
        self.pids = [one.process.pid for one in self._ranks]

    def __len__(self) -> int:
        """Count them."""
        return len(self._ranks)

    @property
    def alive(self) -> bool:
        """Whether they have not been ended."""
        return self._end.alive

    def end(self) -> None:
        """End all; calling it twice is harmless."""
        self._end()

    def ask(
        self, order: Callable[[int], Mapping[str, Any]], arrays: Sequence[AnyArray] = (), *, doing: str
    ) -> Answer:
        """Ask every rank, and wait for all of them.

        Args:
            order: Gives the frame's header for a rank; called while no other thread asks.
            arrays: What goes with it.
            doing: What the ranks are doing, for messages.

        Returns:
            The answer of rank 0.

        Raises:
            WorkerDiedError: A rank is gone; all were ended.
            EngineError: A rank failed and others did not, so all were ended.
            LmoptError: What all ranks have in common; they go on.
            ClosedError: They were ended before, also by an interrupt (Ctrl-C) of the call before.
        """
        with self._lock:
            if not self.alive:
                raise ClosedError("this engine is closed; open a new lmopt.Runtime")
            try:
                for number, rank in enumerate(self._ranks):
                    try:
                        rank.channel.send(order(number), arrays)
                    except OSError:
                        self._lost(number, "it was idle")
                return self._collect(doing)
            except LmoptError:
                raise
            except BaseException:
                # Ctrl-C: what is still to come would be taken for the answers to the next question.
                self.end()
                raise

    def _collect(self, doing: str) -> Answer:
        answers: dict[int, Answer] = {}
        deadline: float | None = None
        with selectors.DefaultSelector() as selector:
            for number, rank in enumerate(self._ranks):
                selector.register(rank.channel.source, selectors.EVENT_READ, number)
            while len(answers) < len(self._ranks):
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = selector.select(left)
                if not ready:
                    self._give_up(answers, doing)
                # One that is gone first: the others then fail for its sake.
                for key, _ in ready:
                    frame = self._ranks[key.data].channel.receive()
                    if frame is None:
                        self._lost(key.data, doing)
                    else:
                        selector.unregister(key.fd)
                        answers[key.data] = frame
                if deadline is None and any("error" in one[0] for one in answers.values()):
                    deadline = time.monotonic() + _PATIENCE_S
        failed = [answer[0]["error"] for answer in answers.values() if "error" in answer[0]]
        if len(failed) == len(answers):
            raise from_failure(failed[0])
        if failed:
            self._give_up(answers, doing)
        return answers[0]

    def _give_up(self, answers: Mapping[int, Answer], doing: str) -> None:
        """A rank failed where others did not: they no longer stand at the same place."""
        self.end()
        number, failure = next((n, one[0]["error"]) for n, one in answers.items() if "error" in one[0])
        raise EngineError(
            f"rank {number} of {len(self)} failed while {doing} ({failure['type']}: {failure['message']}); all ranks "
            "were ended. Open a new lmopt.Runtime."
        )

    def _lost(self, number: int, doing: str) -> None:
        how = self._ranks[number].end(grace_s=1.0)
        self.end()
        raise WorkerDiedError(
            f"rank {number} of {len(self)} (process {self.pids[number]}) was lost while {doing}: {how}. All ranks were "
            "ended; open a new lmopt.Runtime."
        )


def _end(ranks: Sequence[Child]) -> None:
    for rank in ranks:
        rank.end()
