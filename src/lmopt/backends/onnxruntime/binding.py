"""Inputs and outputs of a session bound once, for as many calls as a batch keeps its rows."""

from typing import Final

import numpy as np

from lmopt.backends.onnxruntime.graph import Graph
from lmopt.backends.onnxruntime.rooms import Room
from lmopt.backends.onnxruntime.session import ort
from lmopt.signature import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, POSITION_IDS
from lmopt.types import AnyArray, IntArray

_ALL: Final = 0
"""Value of `logits_to_keep` that asks for the logits of every position."""


class Binding:
    """Neighbouring places of a room as past and present of a graph, at once.

    A call of the same width as the one before writes its few numbers into arrays that are bound
    already; only the logits, which go to the caller, are bound anew, and the mask where it has another width.
    That takes microseconds, where binding keys and values of all layers takes most of a millisecond.

    Args:
        graph: Graph with past and present in one buffer.
        room: Where the rows are.
        start: First place.
        batch: Number of rows.
    """

    def __init__(self, graph: Graph, room: Room, start: int, batch: int) -> None:
        self._graph = graph
        self._session: ort.InferenceSession | None = graph.session()
        self._io: ort.IOBinding | None = self._session.io_binding()
        for one, view in zip(graph.signature.state, room.view(start, start + batch), strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(view)
            self._io.bind_ortvalue_input(one.past.name, value)
            self._io.bind_ortvalue_output(one.present, value)
        self._nothing = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, 1), np.float32))
        self._keep = np.zeros(1, np.int64)
        if graph.keeps_logits:
            self._bind(LOGITS_TO_KEEP, self._keep)
        self._ids = np.zeros((batch, 0), np.int64)
        self._positions = self._ids
        self._columns = self._ids
        self._rows = np.arange(batch)
        self._slots = np.arange(room.capacity)
        self._mask = np.zeros((batch, room.capacity), np.int64)
        self._marked: IntArray | None = None  # ones in each row of the mask, where that is known

    def release(self) -> None:
        """Let go of the session; runs that are inside it keep it until they end."""
        self._session = self._io = None

    def run(self, ids: IntArray, past: IntArray, new: IntArray, logits: AnyArray) -> None:
        """Read tokens, and write logits into an array.

        Args:
            ids: `(batch, sequence)` int64, each in the vocabulary, padding too.
            past: `(batch,)` int64 tokens that each row holds; all of them and `sequence` more have room.
            new: `(batch,)` int64, how many of `ids` are no padding, at least 1 for positions to be right.
            logits: `(batch, kept, vocab_size)`, receives those of the last positions; `kept` must be
                `sequence` where the graph cannot compute fewer.

        Raises:
            EngineError: The run failed.
            ClosedError: The engine was closed meanwhile.
        """
        batch, width = ids.shape
        if width != self._ids.shape[1]:
            self._widen(batch, width)
        self._ids[...] = ids
        if self._graph.signature.has_positions:
            # Padding repeats the last position: there may be no later one.
            np.minimum(self._columns, new[:, None] - 1, out=self._positions)
            self._positions += past[:, None]
        self._mark(past, past + width, width)
        self._keep[0] = _ALL if logits.shape[1] == width else logits.shape[1]
        session, io = self._session, self._io
        if session is None or io is None:
            raise self._graph.failed(RuntimeError("closed"), batch, width)
        io.bind_ortvalue_output(LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))
        try:
            session.run_with_iobinding(io, self._graph.run_options)
        except Exception as error:
            raise self._graph.failed(error, batch, width) from error
        finally:
            if logits.shape[1] > 1:
                # The binding would keep them until the next run, beside those of that run.
                io.bind_ortvalue_output(LOGITS, self._nothing)

    def _mark(self, past: IntArray, total: IntArray, width: int) -> None:
        """Bring the mask to as many ones a row as it holds tokens after the run.

        Calls of one token use the whole mask, always the same, of which the kernels need no more than the
        number of ones. A wider call is given one that ends with the longest row: by that the kernels know a
        row that is read from its start.
        """
        if width == 1:
            if self._marked is not None and (past == self._marked).all():
                self._mask[self._rows, past] = 1
            else:
                np.less(self._slots, total[:, None], out=self._mask)
            self._marked = total
        else:
            longest = int(total.max())
            mask = self._mask.reshape(-1)[: len(total) * longest].reshape(len(total), longest)
            np.less(self._slots[:longest], total[:, None], out=mask)
            self._bind(ATTENTION_MASK, mask)
            self._marked = None

    def _widen(self, batch: int, width: int) -> None:
        """Bind arrays for another number of tokens a call."""
        self._ids = np.zeros((batch, width), np.int64)
        self._bind(INPUT_IDS, self._ids)
        if width == 1:
            self._bind(ATTENTION_MASK, self._mask)
        if self._graph.signature.has_positions:
            self._columns = np.arange(width)[None]
            self._positions = np.zeros((batch, width), np.int64)
            self._bind(POSITION_IDS, self._positions)

    def _bind(self, name: str, array: AnyArray) -> None:
        # The value is the array's own memory, and keeps the array alive.
        assert self._io is not None
        self._io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
