"""How rows enter the batch: who may, and how their prompts are read."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from lmopt.contracts import Engine, State
from lmopt.generation.prefixes import LEAST, shared
from lmopt.generation.rows import Row
from lmopt.generation.sources import begin
from lmopt.generation.workspace import Workspace
from lmopt.types import FloatArray

# A call reads the weights once. Padding is worth a call saved as long as it is no more than this.
_CALL_IN_TOKENS: Final = 16


class _Reading:
    """A prompt that is being read for its rows, which may be several sequences.

    Attributes:
        rows: Its rows; equal so far.
        read: Tokens that were read.
        state: State of one row after them, `None` before the first.
        leader: A prompt that is read first because this one begins in the same way.
        leads: Whether it is such a one.
        recalled: Whether the kept prefixes were asked for its beginning.
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.ids = rows[0].history.seen
        self.read = 0
        self.state: State | None = None
        self.leader: _Reading | None = None
        self.leads = False
        self.recalled = False

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""
        return self.ids.size - self.read


class Entrance:
    """Prompts that wait, and prompts that are being read.

    Args:
        engine: An engine for unequal rows, or a `CohortEngine`.
        workspace: Limits and kept prefixes.
        equal: Whether rows that are read together must be of equal length.
    """

    def __init__(self, engine: Engine, workspace: Workspace, *, equal: bool) -> None:
        self._engine = engine
        self._limits = workspace.limits
        self._prefixes = workspace.prefixes
        self._reuses = workspace.prefixes.serves(engine)
        self._slack = 0 if equal else _CALL_IN_TOKENS
        self._waiting: deque[_Reading] = deque()
        self._reading: list[_Reading] = []
        self._longest = 0

    def __bool__(self) -> bool:
        """Whether anybody waits or is being read."""
        return bool(self._waiting or self._reading)

    def rows(self) -> Iterator[Row]:
        """Give the rows that wait or are being read."""
        return (row for one in (*self._reading, *self._waiting) for row in one.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Let the rows of a request wait, those of one prompt next to each other."""
        self._waiting.extend(_prompts(rows, self._limits.max_num_seqs))

    def drop_finished(self) -> None:
        """Forget rows that were ended from outside, and let go of what was read for them."""
        for one in (*self._waiting, *self._reading):
            one.rows = [row for row in one.rows if row.finish_reason is None]
        self._waiting = deque(one for one in self._waiting if one.rows)
        gone = [one for one in self._reading if not one.rows]
        self._reading = [one for one in self._reading if one.rows]
        for one in self._reading:
            one.leader = None if one.leader in gone else one.leader

    def next(self, running: Sequence[Row]) -> list["_Reading"]:
        """Admit whom the limits allow, and choose the prompts of the next call; `[]` for none."""
        self._admit(running)
        ready = [one for one in self._reading if one.leader is None]
        if not ready:
            return []
        for one in ready:
            self._recall(one)
        ready.sort(key=lambda one: one.left)
        most = self._limits.max_num_batched_tokens
        group = ready[:1]
        if group[0].left > most or group[0].leads:
            return group
        for one in ready[1:]:
            padding = len(group) * (one.left - group[-1].left)
            fits = one.left * (len(group) + 1) <= most and padding <= self._slack
            alike = one.read == group[0].read if self._slack == 0 else bool(one.read) == bool(group[0].read)
            if fits and alike and not one.leads:
                group.append(one)
        return sorted(group, key=lambda one: one.rows[0].prompt)

    def cost(self, group: Sequence["_Reading"]) -> int:
        """Tokens of the call that `read` would make."""
        return len(group) * min(max(one.left for one in group), self._limits.max_num_batched_tokens)

    def read(self, group: list["_Reading"]) -> tuple[list[Row], FloatArray, State] | None:
        """Read on with one call of the engine.

        Returns:
            Where the prompts have been read to their end: their rows, `(rows, vocab_size)` logits, and
            the state; else `None`.
        """
        engine, count = self._engine, len(group)
        lengths = np.array([min(one.left, self._limits.max_num_batched_tokens) for one in group])
        input_ids = np.zeros((count, lengths.max()), np.int64)
        for line, one, length in zip(input_ids, group, lengths, strict=True):
            line[:length] = one.ids[one.read : one.read + length]
        states = [one.state for one in group if one.state is not None]
        for one in group:
            one.state = None
        if not states:
            # Room for the longest row around: they are going to share a batch.
            state = begin(engine, [one.rows[0].source for one in group], capacity=self._longest)
        else:
            state = states[0] if count == 1 else engine.join(states)
        logits, state = engine.forward(input_ids, lengths, state, last_only=True)
        for one, length in zip(group, lengths, strict=True):
            one.read += int(length)
        if group[0].left:
            group[0].state = state
            return None
        if group[0].leads:
            self._prefixes.put(engine, group[0].ids, state)
        self._reading = [one for one in self._reading if one not in group]
        for one in self._reading:
            one.leader = None if one.leader in group else one.leader
        rows = [row for one in group for row in one.rows]
        if count < len(rows):
            # Sequences of one prompt share its reading.
            repeats = np.repeat(np.arange(count), [len(one.rows) for one in group])
            logits, state = logits[repeats], engine.select(state, repeats)
        return rows, logits[:, -1], state

    def _admit(self, running: Sequence[Row]) -> None:
        inside = [*running, *(row for one in self._reading for row in one.rows)]
        self._longest = self._reserved(inside) if inside else 0
        count = len(inside)
        while self._waiting:
            new = self._waiting[0]
            longest = max(self._longest, self._reserved(new.rows))
            many = count + len(new.rows)
            if count and (many > self._limits.max_num_seqs or not self._has_room(many * longest)):
                return
            self._waiting.popleft()
            count, self._longest = many, longest
            if self._reuses:
                new.leader = next((one for one in self._reading if _alike(one, new)), None)
                if new.leader is not None:
                    new.leader.leads = True
            self._reading.append(new)

    def _reserved(self, rows: Sequence[Row]) -> int:
        """Tokens for which the longest of these rows needs room, drafts that come to nothing included."""
        tokens = max(row.history.max_length + (row.lookup.most if row.lookup else 0) for row in rows)
        return min(tokens, self._engine.facts.context_length or tokens)

    def _has_room(self, tokens: int) -> bool:
        return self._engine.facts.context_length is None or tokens <= self._limits.max_cache_tokens

    def _recall(self, one: "_Reading") -> None:
        """Take over what an earlier text has in common with a prompt, before anything of it is read."""
        if self._reuses and not one.recalled:
            one.recalled = True
            one.read, one.state = self._prefixes.take(self._engine, one.ids, self._longest)


def _prompts(rows: Sequence[Row], most: int) -> list[_Reading]:
    """Put the sequences of a prompt together, as many as may run at once."""
    found: list[list[Row]] = []
    for row in rows:
        if found and found[-1][0].prompt == row.prompt and len(found[-1]) < most:
            found[-1].append(row)
        else:
            found.append([row])
    return [_Reading(one) for one in found]


def _alike(one: _Reading, other: _Reading) -> bool:
    # What the last token is read for is the logits: that much is left to be read in any case.
    return min(shared(one.ids, other.ids), other.ids.size - 1) >= LEAST
