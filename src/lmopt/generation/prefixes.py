"""States of texts that were read before, for prompts that begin in the same way."""

import threading
from dataclasses import dataclass
from typing import Final

import numpy as np

from lmopt.contracts import Engine, State, SupportsRewind
from lmopt.errors import UnsupportedOptionError
from lmopt.types import IntArray

LEAST: Final = 16
"""Tokens that two texts must share for a copy of the state to be worth its while."""


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """What a `PrefixStore` holds and what it was good for.

    Attributes:
        limit: Most tokens that it may hold.
        tokens: Tokens whose states it holds.
        entries: Number of texts.
        requests: Prompts that were looked up.
        hits: How many of them began like one of the texts.
        reused: Tokens that did not have to be read again.
    """

    limit: int
    tokens: int = 0
    entries: int = 0
    requests: int = 0
    hits: int = 0
    reused: int = 0


@dataclass(frozen=True, slots=True)
class _Entry:
    """The ids of a text, and a state of one row that has read just them."""

    ids: IntArray
    state: State


class PrefixStore:
    """Keeps states of texts up to a number of tokens; the least recently used one goes first.

    May be used by several threads.

    Args:
        limit: Most tokens; 0 keeps nothing.

    Raises:
        UnsupportedOptionError: It is not a whole number of at least 0.
    """

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise UnsupportedOptionError(
                f"prefix_cache_tokens={limit!r} is not possible; expected an integer >= 0."
            )
        self._limit = limit
        self._entries: list[_Entry] = []  # least recently used first
        self._counts = [0, 0, 0]
        self._lock = threading.Lock()

    def serves(self, engine: Engine) -> bool:
        """Whether anything can be kept: whether the engine's rows can be copied and rewound.

        With an encoder, what a prompt's tokens come to depends on the source before them: nothing is kept then.
        """
        return self._limit > 0 and engine.facts.source is None and rewinds(engine)

    def take(self, engine: Engine, ids: IntArray, capacity: int) -> tuple[int, State | None]:
        """Find the text that shares the longest beginning with a prompt.

        Args:
            engine: The engine that the states are of.
            ids: `(n,)` ids of the prompt. At least one of them is left to be read, as it takes a call
                to get logits.
            capacity: Most tokens that the row will hold.

        Returns:
            Tokens that need not be read, and a state of one row that has read them; 0 and `None`.
        """
        with self._lock:
            if self._limit <= 0:
                return 0, None
            self._counts[0] += 1
            lengths = [min(shared(one.ids, ids), ids.size - 1) for one in self._entries]
            best = int(np.argmax(lengths)) if lengths else 0
            if not lengths or lengths[best] < LEAST:
                return 0, None
            entry, length = self._entries.pop(best), lengths[best]
            self._entries.append(entry)
            self._counts[1] += 1
            self._counts[2] += length
        # A kept state is never changed, so it may be copied while others read it too.
        capacity = max(capacity, entry.ids.size)
        state: State = engine.copy(entry.state, capacity=capacity)  # type: ignore[attr-defined]
        if length < entry.ids.size:
            state = engine.rewind(state, np.array([length]))  # type: ignore[attr-defined]
        return length, state

    def put(self, engine: Engine, ids: IntArray, state: State) -> None:
        """Keep a text.

        Args:
            engine: The engine that the state is of.
            ids: `(n,)` ids that the state has read.
            state: State of one row; stays the caller's.
        """
        with self._lock:
            # A text that another one begins with is in that one.
            if not LEAST <= ids.size <= self._limit or self._holds(ids):
                return
        # A copy holds no more than it must: a row's own state has room for all that it might have become.
        kept = engine.copy(state, capacity=ids.size)  # type: ignore[attr-defined]
        with self._lock:
            if self._holds(ids):
                return
            self._entries = [one for one in self._entries if shared(one.ids, ids) < one.ids.size]
            self._entries.append(_Entry(ids.copy(), kept))
            while sum(one.ids.size for one in self._entries) > self._limit:
                self._entries.pop(0)

    def _holds(self, ids: IntArray) -> bool:
        return any(shared(one.ids, ids) == ids.size for one in self._entries)

    def clear(self) -> None:
        """Let go of everything, and keep nothing from now on."""
        with self._lock:
            self._limit = 0
            self._entries = []

    def report(self) -> PrefixReport:
        """Say what is held and what it was good for."""
        with self._lock:
            tokens = sum(one.ids.size for one in self._entries)
            return PrefixReport(self._limit, tokens, len(self._entries), *self._counts)


def rewinds(engine: Engine) -> bool:
    """Whether an engine's rows can be rewound and copied."""
    return isinstance(engine, SupportsRewind) and engine.rewinds


def shared(one: IntArray, other: IntArray) -> int:
    """Count the ids that two texts have in common at their start."""
    size = min(one.size, other.size)
    different = one[:size] != other[:size]
    return int(different.argmax()) if different.any() else size
