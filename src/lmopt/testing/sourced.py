"""An encoder-decoder engine behind one source: a decoder like any other, for rules that know of no sources."""

from collections.abc import Mapping, Sequence

import numpy as np

from lmopt.contracts import Engine, EngineReport, PaddingSide, State, SupportsEncoder, SupportsRewind
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts


class SourcedEngine:
    """An engine whose every row begins with the same source.

    Args:
        engine: Engine of an encoder-decoder; closed by this one.
        source: `(source,)` ids or `(size, source)` features.
    """

    def __init__(self, engine: Engine, source: AnyArray) -> None:
        self.inner = engine
        self._source = source

    @property
    def facts(self) -> ModelFacts:
        """Facts of the model."""
        return self.inner.facts

    @property
    def ragged(self) -> bool:
        """Whether rows may be unequal."""
        return self.inner.ragged

    @property
    def rewinds(self) -> bool:
        """Whether rows can be copied and rewound."""
        return isinstance(self.inner, SupportsRewind) and self.inner.rewinds

    @property
    def encoder(self) -> SupportsEncoder:
        """The engine as one that runs encoder-decoders.

        Raises:
            TypeError: It declares the feature `"encoder"` and has no such methods.
        """
        if not isinstance(self.inner, SupportsEncoder):
            raise TypeError(f"{type(self.inner).__name__} lacks methods of lmopt.contracts.SupportsEncoder")
        return self.inner

    def begin(self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right") -> State:
        """Read the source for each row."""
        inputs = np.stack([self._source] * batch)
        lengths = np.full(batch, self._source.shape[-1])
        return self.encoder.encode(inputs, lengths, capacity=capacity, padding_side=padding_side)

    def encode(
        self,
        inputs: AnyArray,
        lengths: IntArray,
        *,
        capacity: int | None = None,
        padding_side: PaddingSide = "right",
    ) -> State:
        """Read sources."""
        return self.encoder.encode(inputs, lengths, capacity=capacity, padding_side=padding_side)

    def encoded(self, state: State) -> Mapping[str, AnyArray]:
        """Show what rows hold of their sources."""
        return self.encoder.encoded(state)

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: State, *, last_only: bool = False
    ) -> tuple[FloatArray, State]:
        """Read new tokens."""
        return self.inner.forward(input_ids, lengths, state, last_only=last_only)

    def select(self, state: State, rows: IntArray) -> State:
        """Keep, drop, reorder or repeat rows."""
        return self.inner.select(state, rows)

    def join(self, states: Sequence[State]) -> State:
        """Put the rows of several states into one batch."""
        return self.inner.join(states)

    def rewind(self, state: State, lengths: IntArray) -> State:
        """Let each row forget all but its first tokens."""
        rewound: State = self.inner.rewind(state, lengths)  # type: ignore[attr-defined]
        return rewound

    def copy(self, state: State, *, capacity: int | None = None) -> State:
        """Make an independent copy."""
        copied: State = self.inner.copy(state, capacity=capacity)  # type: ignore[attr-defined]
        return copied

    def report(self) -> EngineReport:
        """Say what the engine really does."""
        return self.inner.report()

    def close(self) -> None:
        """Close the engine."""
        self.inner.close()
