"""The rows that are being decoded, and one step of theirs."""

import time
from collections.abc import Generator, Sequence

import numpy as np

from lmopt.contracts import Engine, State, SupportsBest
from lmopt.generation.choosing import best_needed, give, most_best
from lmopt.generation.lookup import Drafting
from lmopt.generation.prefixes import rewinds
from lmopt.generation.rows import Row
from lmopt.generation.workspace import Workspace
from lmopt.types import FloatArray, IntArray


class Running:
    """Rows that have at least one token of their own, and the state that has read all but the newest.

    Args:
        engine: Engine for unequal rows.
        workspace: Costs and kept prefixes.
        keeps: Whether the state of a row that ends goes to the kept prefixes.
    """

    def __init__(self, engine: Engine, workspace: Workspace, *, keeps: bool) -> None:
        self.rows: list[Row] = []
        self._engine = engine
        self._workspace = workspace
        self._parts: list[tuple[int, State]] = []  # how many of the rows, and their state
        self._drafting: Drafting | None = None  # from the first row on that asks for prompt lookup
        self._most_best = most_best(engine)
        self._keeps = keeps
        self._ones = np.ones(0, np.int64)

    def add(self, rows: list[Row], state: State) -> None:
        """Let rows enter that have just been given their first token."""
        if self._drafting is None and rewinds(self._engine) and any(row.lookup for row in rows):
            self._drafting = Drafting(self._workspace.costs)
        self.rows = self.rows + rows
        self._parts.append((len(rows), state))

    def drop_finished(self) -> None:
        """Let finished rows leave, and their part of the state go."""
        if all(row.finish_reason is None for row in self.rows):
            return
        if self._keeps and len(self.rows) == 1:
            self._keep(self.rows[0], self._parts[0][1])
        parts, start = [], 0
        for count, state in self._parts:
            kept = [n for n, row in enumerate(self.rows[start : start + count]) if row.finish_reason is None]
            start += count
            if kept:
                parts.append(
                    (len(kept), state if len(kept) == count else self._engine.select(state, np.array(kept)))
                )
        self._parts = parts
        self.rows = [row for row in self.rows if row.finish_reason is None]

    def step(self) -> Generator[list[Row]]:
        """Give each row its next token, or several where a draft is right.

        Yields:
            The rows that have just been given a token.
        """
        rows = self.rows
        drafts = None if self._drafting is None else self._drafting.propose(rows)
        newest = [row.history.newest for row in rows]
        began = time.perf_counter()
        wanted = best_needed(rows) if self._most_best else 0
        if 0 < wanted <= self._most_best:
            yield give(rows, *self._best(np.array(newest)[:, None], wanted))
            return
        if drafts is None:
            if self._ones.size != len(rows):
                self._ones = np.ones(len(rows), np.int64)
            logits = self._forward(np.array(newest)[:, None], self._ones, last_only=True)
            if self._drafting is not None:
                self._workspace.costs.record(len(rows), 0, time.perf_counter() - began)
            yield give(rows, logits[:, -1])
            return
        lengths = np.array([1 + draft.size for draft in drafts])
        input_ids = np.zeros((len(rows), lengths.max()), np.int64)
        for line, first, draft in zip(input_ids, newest, drafts, strict=True):
            line[0] = first
            line[1 : 1 + draft.size] = draft
        logits = self._forward(input_ids, lengths)
        self._workspace.costs.record(len(rows), int(lengths.max()) - 1, time.perf_counter() - began)
        yield from self._verify(rows, drafts, logits)

    def _verify(self, rows: list[Row], drafts: list[IntArray], logits: FloatArray) -> Generator[list[Row]]:
        """Choose tokens one after the other for as long as the drafts foresaw them; rewind the rest."""
        assert self._drafting is not None
        accepted = [0] * len(rows)
        before = np.array([row.history.length for row in rows])
        going = list(range(len(rows)))
        place = 0
        while going:
            given = give([rows[n] for n in going], logits[going, place])
            yield given
            going = [n for n in going if _foreseen(rows[n], drafts[n], place, int(before[n]))]
            for n in going:
                accepted[n] += 1
            going = [n for n in going if rows[n].finish_reason is None]
            place += 1
        self._drafting.judge(rows, drafts, accepted)
        read = before + [draft.size for draft in drafts]
        known = np.minimum(read, [row.history.length - 1 for row in rows])
        if (known < read).any():
            ((count, state),) = self._parts
            self._parts = [(count, self._engine.rewind(state, known))]  # type: ignore[attr-defined]

    def _forward(self, input_ids: IntArray, lengths: IntArray, *, last_only: bool = False) -> FloatArray:
        logits, state = self._engine.forward(input_ids, lengths, self._joined(), last_only=last_only)
        self._parts = [(len(self.rows), state)]
        return logits

    def _best(
        self, input_ids: IntArray, count: int
    ) -> tuple[Sequence[FloatArray], Sequence[IntArray | None]]:
        assert isinstance(self._engine, SupportsBest)
        logits, ids, state = self._engine.forward_best(input_ids, self._joined(), count)
        self._parts = [(len(self.rows), state)]
        return logits, ids

    def _joined(self) -> State:
        """Give the state of all rows. It will be consumed: if the call fails, nothing of it may be used again."""
        parts, self._parts = self._parts, []
        return parts[0][1] if len(parts) == 1 else self._engine.join([one for _, one in parts])

    def _keep(self, row: Row, state: State) -> None:
        if row.finish_reason in ("stop", "stop_string", "length"):
            self._workspace.prefixes.put(self._engine, row.history.seen[: int(state.lengths[0])], state)


def _foreseen(row: Row, draft: IntArray, place: int, before: int) -> bool:
    """Whether a row was given the token that stands at this place of its draft."""
    return (
        place < draft.size
        and row.history.length == before + place + 1
        and row.history.newest == int(draft[place])
    )
