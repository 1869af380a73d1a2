"""Run graphs whose keys and values OpenVINO keeps itself, in the request that computes: one a state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmopt.contracts import PaddingSide
from lmopt.signature import ArrayState
from lmopt.types import AnyArray, FloatArray, IntArray
from lmopt_openvino.attention import ROWS
from lmopt_openvino.base import GraphEngine
from lmopt_openvino.silent import ov

_SPARE = 64  # slots that may stay in a cache although no row can see them: cutting copies the whole


@dataclass(slots=True)
class CachedState:
    """State of a batch.

    Attributes:
        request: Holds keys and values.
        book: Mask, lengths and padding; no tensors.
        rows: Rows of the request's cache that the rows of this state go on from, in the next call.
    """

    request: Any
    book: ArrayState
    rows: IntArray

    @property
    def lengths(self) -> IntArray:
        """`(batch,)` int64, tokens that each row has read so far."""
        return self.book.lengths


class CachedEngine(GraphEngine):
    """One exported decoder with attention and cache in one operator."""

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> CachedState:
        """Make the empty state of `batch` rows; OpenVINO's cache grows in steps, so `capacity` has no use."""
        book = ArrayState({}, np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64), padding_side)
        return CachedState(self._graph.request(), book, np.arange(batch))

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: CachedState, *, last_only: bool = False
    ) -> tuple[FloatArray, CachedState]:
        """Read new tokens; see `lmopt.contracts.Engine.forward`."""
        step = self._signature.step(input_ids, lengths, state.book)
        feeds = self._graph.feeds(step, last_only=last_only)
        self._graph.run(state.request, {**feeds, ROWS: state.rows.astype(np.int32)})
        book = ArrayState({}, step.mask, step.lengths, step.padding_side)
        logits = self._graph.logits(state.request, step, last_only=last_only)
        return logits, CachedState(state.request, book, np.arange(len(book.lengths)))

    def select(self, state: CachedState, rows: IntArray) -> CachedState:
        """Keep, drop, reorder or repeat rows; the cache itself is left alone until the next call."""
        self._graph.compiled()
        book = state.book
        kept = ArrayState({}, book.mask[rows], book.lengths[rows], book.padding_side)
        return CachedState(state.request, kept, state.rows[rows])

    def join(self, states: Sequence[CachedState]) -> CachedState:
        """Put the rows of several states into one batch."""
        self._graph.compiled()
        if len(states) == 1:
            return states[0]
        return self._with_cache(self._signature.join([self._with_arrays(one) for one in states]))

    def rewind(self, state: CachedState, lengths: IntArray) -> CachedState:
        """Let each row forget all but its first tokens.

        The mask hides what is forgotten; once there is much of it, the slots that no row sees any more are cut out.
        """
        self._graph.compiled()
        kept, mask, slots = self._signature.forget(state.book, lengths)
        lost = state.book.mask.shape[1] - slots
        hidden = np.pad(mask, ((0, 0), (0, lost)))
        after = CachedState(state.request, ArrayState({}, hidden, kept, state.book.padding_side), state.rows)
        seen = hidden.any(axis=0)
        if (~seen).sum() <= max(_SPARE, seen.sum() // 4):
            return after
        arrays = self._with_arrays(after)
        tensors = {name: one[:, :, seen] for name, one in arrays.tensors.items()}
        return self._with_cache(ArrayState(tensors, hidden[:, seen], kept, arrays.padding_side))

    def copy(self, state: CachedState, *, capacity: int | None = None) -> CachedState:
        """Make an independent copy."""
        return self._with_cache(self._with_arrays(state))

    def _with_arrays(self, state: CachedState) -> ArrayState:
        """Take keys and values out of a request, `(rows, heads, slots, width)` float32 each."""
        book = state.book
        tensors: dict[str, AnyArray] = {}
        if book.mask.shape[1]:
            for one in state.request.query_state():
                tensors[one.name] = np.take(one.state.data, state.rows, axis=0)
        else:
            tensors = self._signature.begin(len(book.lengths)).tensors
        return ArrayState(tensors, book.mask, book.lengths, book.padding_side)

    def _with_cache(self, arrays: ArrayState) -> CachedState:
        """Put keys and values into a new request."""
        request = self._graph.request()
        if arrays.mask.shape[1]:
            for one in request.query_state():
                one.state = ov.Tensor(np.ascontiguousarray(arrays.tensors[one.name]))
        book = ArrayState({}, arrays.mask, arrays.lengths, arrays.padding_side)
        return CachedState(request, book, np.arange(len(book.lengths)))
