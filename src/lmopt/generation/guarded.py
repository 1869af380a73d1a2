"""An engine that several threads use and that one of them may close."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

from lmopt.contracts import Engine, EngineReport, PaddingSide, State, SupportsBest, SupportsEncoder
from lmopt.errors import ClosedError
from lmopt.generation.choosing import most_best
from lmopt.generation.prefixes import rewinds
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts


class GuardedEngine:
    """Keeps an engine open for as long as a call is inside it.

    After `close` every call raises `ClosedError`; those that are inside finish, and the last one out
    closes the engine. So nobody waits, and no memory is released under a running kernel.

    Args:
        engine: The engine; closed by this one.
        name: What is closed, for the message.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._lock = threading.Lock()
        self._inside = 0
        self._closed = False

    @property
    def facts(self) -> ModelFacts:
        """Facts of the engine's model."""
        return self._engine.facts

    @property
    def ragged(self) -> bool:
        """Whether rows may be unequal."""
        return self._engine.ragged

    @property
    def rewinds(self) -> bool:
        """Whether rows can be copied and rewound."""
        return rewinds(self._engine)

    @property
    def inner(self) -> Engine:
        """The engine itself.

        Raises:
            ClosedError: It is closed.
        """
        self._check()
        return self._engine

    def opened(self) -> Self:
        """Give this engine itself.

        Raises:
            ClosedError: It is closed.
        """
        self._check()
        return self

    def begin(self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right") -> State:
        """Make the empty state of `batch` rows."""
        with self._open() as engine:
            return engine.begin(batch, capacity=capacity, padding_side=padding_side)

    @property
    def ragged_sources(self) -> bool:
        """Whether rows may have sources of unequal length."""
        return isinstance(self._engine, SupportsEncoder) and self._engine.ragged_sources

    def encode(
        self,
        inputs: AnyArray,
        lengths: IntArray,
        *,
        capacity: int | None = None,
        padding_side: PaddingSide = "right",
    ) -> State:
        """Read sources; for engines that run encoder-decoder models."""
        with self._open() as engine:
            state: State = engine.encode(inputs, lengths, capacity=capacity, padding_side=padding_side)  # type: ignore[attr-defined]
            return state

    def encoded(self, state: State) -> Mapping[str, AnyArray]:
        """Show what rows hold of their sources."""
        with self._open() as engine:
            shown: Mapping[str, AnyArray] = engine.encoded(state)  # type: ignore[attr-defined]
            return shown

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: State, *, last_only: bool = False
    ) -> tuple[FloatArray, State]:
        """Read new tokens."""
        with self._open() as engine:
            return engine.forward(input_ids, lengths, state, last_only=last_only)

    @property
    def most_best(self) -> int:
        """Most logits of a row that can be asked for alone."""
        return most_best(self._engine)

    def forward_best(
        self, input_ids: IntArray, state: State, count: int
    ) -> tuple[Sequence[FloatArray], Sequence[IntArray | None], State]:
        """Read one new token a row; for engines whose `most_best` is not 0."""
        with self._open() as engine:
            assert isinstance(engine, SupportsBest)
            return engine.forward_best(input_ids, state, count)

    def select(self, state: State, rows: IntArray) -> State:
        """Keep, drop, reorder or repeat rows."""
        with self._open() as engine:
            return engine.select(state, rows)

    def join(self, states: Sequence[State]) -> State:
        """Put the rows of several states into one batch."""
        with self._open() as engine:
            return engine.join(states)

    def rewind(self, state: State, lengths: IntArray) -> State:
        """Let each row forget all but its first tokens; for engines whose `rewinds` is true."""
        with self._open() as engine:
            rewound: State = engine.rewind(state, lengths)  # type: ignore[attr-defined]
            return rewound

    def copy(self, state: State, *, capacity: int | None = None) -> State:
        """Make an independent copy; for engines whose `rewinds` is true."""
        with self._open() as engine:
            copied: State = engine.copy(state, capacity=capacity)  # type: ignore[attr-defined]
            return copied

    def report(self) -> EngineReport:
        """Say what the engine really does."""
        with self._open() as engine:
            return engine.report()

    def close(self) -> None:
        """Release the engine as soon as nobody is inside; calling it twice is harmless."""
        with self._lock:
            already, self._closed = self._closed, True
            last = not already and self._inside == 0
        if last:
            self._engine.close()

    def _check(self) -> None:
        if self._closed:
            raise ClosedError(f"this runtime of {self._name} is closed; open a new lmopt.Runtime")

    @contextmanager
    def _open(self) -> Iterator[Engine]:
        with self._lock:
            self._check()
            self._inside += 1
        try:
            yield self._engine
        finally:
            with self._lock:
                self._inside -= 1
                last = self._closed and self._inside == 0
            if last:
                self._engine.close()
