"""Continuous batching: finished rows leave, waiting ones enter, long prompts do not hold up the others."""

from collections.abc import Generator

from lmopt.contracts import Engine
from lmopt.generation.choosing import give
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.generation.entrance import Entrance
from lmopt.generation.interruption import Interruption
from lmopt.generation.rows import Row
from lmopt.generation.running import Running
from lmopt.generation.workspace import Workspace


def steps(
    engine: Engine, rows: list[Row], workspace: Workspace, interruption: Interruption
) -> Generator[list[Row]]:
    """Give each row its tokens, call by call of the engine, until all rows are finished.

    Between two steps of the running rows, prompts of at most `max_num_batched_tokens` tokens are read.

    Args:
        engine: Any engine.
        rows: From `prepare`; changed in place.
        workspace: Limits, kept prefixes and costs.
        interruption: Asked before each call.

    Yields:
        The rows that have just been given a token.
    """
    equal = not engine.ragged
    engine = for_unequal_rows(engine)
    entrance = Entrance(engine, rows, workspace, equal=equal)
    running = Running(
        engine,
        workspace,
        lookup=any(row.lookup is not None for row in rows),
        keeps=len(rows) == 1 and workspace.prefixes.serves(engine),
    )
    spent = 0
    while True:
        if interruption.mark(rows):
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
        if not running.rows:
            return
        spent = 0
        yield from running.step()
