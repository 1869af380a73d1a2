"""Continuous batching: finished rows leave, waiting ones enter, long prompts do not hold up the others."""

from collections.abc import Generator, Sequence
from itertools import chain
from typing import Protocol

from lmopt.contracts import Engine
from lmopt.generation.choosing import give
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.generation.entrance import Entrance
from lmopt.generation.interruption import Interruption
from lmopt.generation.rows import Row
from lmopt.generation.running import Running
from lmopt.generation.workspace import Workspace


class Arrivals(Protocol):
    """Where rows come from while others run."""

    def take(self, *, wait: bool) -> Sequence[list[Row]] | None:
        """Give the requests that have come since the last time.

        Args:
            wait: Nothing runs: do not return before there is one, or there will be none.

        Returns:
            For each request its rows, from `prepare`; `None` where no more will come.
        """
        ...


def steps(
    engine: Engine,
    rows: list[Row],
    workspace: Workspace,
    interruption: Interruption,
    arrivals: Arrivals | None = None,
) -> Generator[list[Row]]:
    """Give each row its tokens, call by call of the engine, until all rows are finished.

    Between two steps of the running rows, prompts of at most `max_num_batched_tokens` tokens are read.

    Args:
        engine: Any engine.
        rows: From `prepare`; changed in place.
        workspace: Limits, kept prefixes and costs.
        interruption: Asked before each call.
        arrivals: Asked before each call for more rows, which share the batch from then on.

    Yields:
        The rows that have just been given a token.
    """
    equal = not engine.ragged
    engine = for_unequal_rows(engine)
    entrance = Entrance(engine, workspace, equal=equal)
    entrance.add(rows)
    keeps = (len(rows) == 1 or arrivals is not None) and workspace.prefixes.serves(engine)
    running = Running(engine, workspace, keeps=keeps)
    spent = 0
    while True:
        if arrivals is not None:
            requests = arrivals.take(wait=not (entrance or running.rows))
            if requests is None:
                arrivals = None
            for request in requests or ():
                entrance.add(request)
        if interruption.mark(chain(running.rows, entrance.rows())):
            entrance.drop_finished()
        running.drop_finished()
        if entrance:
            group = entrance.next(running.rows)
            cost = entrance.cost(group) if group else 0
            if group and (not running.rows or spent + cost <= workspace.limits.max_num_batched_tokens):
                spent += cost
                entered = entrance.read(group)
                if entered is not None:
                    new, logits = entered[:2]
                    running.add(new, entered[2])
                    del entered  # the state is consumed by the next step
                    yield give(new, logits)
                continue
        if running.rows:
            spent = 0
            yield from running.step()
        elif arrivals is None:
            return
