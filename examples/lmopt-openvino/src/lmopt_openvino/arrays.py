"""Run graphs whose state OpenVINO cannot keep: it is handed over with each call, and comes back."""

from collections.abc import Sequence

import numpy as np

from lmopt.contracts import PaddingSide
from lmopt.signature import ArrayState
from lmopt.types import FloatArray, IntArray
from lmopt_openvino.base import GraphEngine


class ArrayEngine(GraphEngine):
    """One exported decoder; a state is a dictionary of NumPy arrays, and `Signature` does the rest."""

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> ArrayState:
        """Make the empty state of `batch` rows; it grows by itself, so `capacity` has no use."""
        self._graph.compiled()
        return self._signature.begin(batch, padding_side)

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: ArrayState, *, last_only: bool = False
    ) -> tuple[FloatArray, ArrayState]:
        """Read new tokens; see `lmopt.contracts.Engine.forward`."""
        step = self._signature.step(input_ids, lengths, state)
        # A request of its own: threads may call at once, and its memory goes with it.
        request = self._graph.request()
        self._graph.run(request, {**self._graph.feeds(step, last_only=last_only), **state.tensors})
        tensors = {
            one.past.name: np.array(request.get_tensor(one.present).data) for one in self._signature.state
        }
        logits = self._graph.logits(request, step, last_only=last_only)
        return logits, ArrayState(tensors, step.mask, step.lengths, step.padding_side)

    def select(self, state: ArrayState, rows: IntArray) -> ArrayState:
        """Keep, drop, reorder or repeat rows."""
        return self._signature.select(state, rows)

    def join(self, states: Sequence[ArrayState]) -> ArrayState:
        """Put the rows of several states into one batch."""
        return self._signature.join(states)

    def rewind(self, state: ArrayState, lengths: IntArray) -> ArrayState:
        """Let each row forget all but its first tokens."""
        return self._signature.rewind(state, lengths)

    def copy(self, state: ArrayState, *, capacity: int | None = None) -> ArrayState:
        """Make an independent copy: calls make new arrays and leave old ones alone, so both share them."""
        return ArrayState(dict(state.tensors), state.mask, state.lengths, state.padding_side)
