"""Run graphs of the dialect `"onnxruntime"`: past and present of the cache are one buffer."""

import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from lmopt.backends.onnxruntime.binding import Binding
from lmopt.backends.onnxruntime.graph import Graph
from lmopt.backends.onnxruntime.rooms import Room, require_memory
from lmopt.checking import check_rewind, check_step, whole_numbers
from lmopt.contracts import EngineReport, PaddingSide
from lmopt.errors import ContextLengthError, CorruptArtifactError, InsufficientMemoryError
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts

_FIRST_CAPACITY: Final = 64
"""Tokens that a row first has room for where nobody says how many it will hold."""
_MOST_TOKENS: Final = 512
"""Most tokens, of all rows, in one run. Twice as many are some 5 % faster, and wait twice as long for Ctrl-C."""


@dataclass(slots=True)
class SharedState:
    """Rows of a batch in neighbouring places of a room of their own.

    Attributes:
        room: Where they are.
        start: First place.
        lengths: `(batch,)` int64, tokens that each row has read.
        bindings: Places of the room that are bound to the session, by the first of them and their number.
    """

    room: Room
    start: int
    lengths: IntArray
    bindings: dict[tuple[int, int], Binding] = field(default_factory=dict)

    def row(self, number: int) -> "SharedState":
        """Give one row as a state of its own, in the same place."""
        return SharedState(self.room, self.start + number, self.lengths[number : number + 1], self.bindings)


class SharedCacheEngine:
    """One exported decoder whose cache is written in place.

    In float32 a row's results are, bit for bit, those that it has alone: they do not depend on the rows beside
    it, on where it stands, on the capacity, or on the number of threads. How a row's tokens are split
    over calls makes no difference either among calls of two or more tokens; for a call of one token ONNX
    Runtime has another attention kernel, which rounds otherwise. Both kernels stand where a matrix has one row, so
    tokens are read in even numbers, with one of padding if need be, and no block of the kernel is ever
    left with a single one. With `deterministic` this holds for calls of one token too, which then take
    two, row by row; no split makes a difference any more. Two things are not covered: the last
    position of the context, behind which there is no room for padding, and graphs that compute sines
    in each call (where a head is no multiple of 16 wide), as vector instructions round those otherwise at an edge.

    Args:
        graph: Graph of the dialect `"onnxruntime"`; closed by this engine.
        facts: Facts of the model.
        deterministic: As above.

    Raises:
        CorruptArtifactError: The state of the graph is no cache of keys and values.
    """

    ragged: Final = True
    rewinds: Final = True

    def __init__(self, graph: Graph, facts: ModelFacts, *, deterministic: bool = False) -> None:
        self.facts = facts
        self._graph = graph
        self._tensors = graph.signature.state
        self._deterministic = deterministic
        self._bound: weakref.WeakSet[Binding] = weakref.WeakSet()
        strange = [one.past.name for one in self._tensors if one.batch_axis != 0 or not one.past_axis]
        if strange or not graph.signature.has_mask:
            raise CorruptArtifactError(
                f"a graph of the dialect 'onnxruntime' has attention_mask and caches of the shape (batch_size, ..., "
                f"past_sequence_length, ...); this one has {strange[0] if strange else 'no mask'}"
            )

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> SharedState:
        """Make the empty state of `batch` rows; there is no padding in the cache, on no side.

        Raises:
            InsufficientMemoryError: The rows do not fit into memory.
            ContextLengthError: The model has no position for as many tokens.
        """
        self._graph.session()
        if capacity is None:
            capacity = min(_FIRST_CAPACITY, self.facts.context_length or _FIRST_CAPACITY)
        self._check_context(capacity)
        room = Room(self._tensors, batch, self._capacity(capacity))
        return SharedState(room, 0, np.zeros(batch, np.int64))

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: SharedState, *, last_only: bool = False
    ) -> tuple[FloatArray, SharedState]:
        """Read new tokens; see `lmopt.contracts.Engine.forward`.

        Raises:
            ContextLengthError: A row would hold more tokens than the model has positions.
            InsufficientMemoryError: The cache has to grow, or the logits are large, and memory is short.
        """
        self._graph.session()
        ids = whole_numbers(input_ids, "input_ids")
        new = whole_numbers(lengths, "lengths")
        check_step(ids, new, state.lengths, self.facts.vocab_size)
        batch, width = ids.shape
        after = state.lengths + new
        self._check_context(int(after.max()))
        if width > 1 and new.min() < width:
            # A padding id may be anything in the caller's array; 0 is in every vocabulary.
            ids = np.where(np.arange(width) < new[:, None], ids, 0)
        padded_fits = self._make_room(state, after, width)
        if batch == 1:
            logits = self._read_row(ids, state, last_only=last_only)
        elif padded_fits and self._together(state, batch, width):
            logits = self._run(ids, new, state, last_only=last_only)
        else:
            logits = self._empty(batch, 1 if last_only else width)
            for row in range(batch):
                given = self._read_row(ids[row : row + 1, : new[row]], state.row(row), last_only=last_only)
                logits[row, : given.shape[1]] = given[0]
        state.lengths = after
        return logits.astype(np.float32, copy=False), state

    def select(self, state: SharedState, rows: IntArray) -> SharedState:
        """Keep, drop, reorder or repeat rows; only rows that change places are copied."""
        self._graph.session()
        rows = whole_numbers(rows, "rows")
        lengths = state.lengths[rows]
        room, count = state.room, len(rows)
        if count > room.places:
            larger = Room(self._tensors, count, room.capacity)
            for place, row in enumerate(rows):
                larger.take(place, room, state.start + int(row), int(state.lengths[row]))
            return SharedState(larger, 0, lengths)
        # The first place that leaves most rows where they are.
        starts, votes = np.unique(state.start + rows - np.arange(count), return_counts=True)
        start = int(np.clip(starts[votes.argmax()], 0, room.places - count))
        held = dict(enumerate(state.lengths.tolist(), state.start))
        room.rearrange({start + n: state.start + row for n, row in enumerate(rows.tolist())}, held)
        return SharedState(room, start, lengths, state.bindings)

    def join(self, states: Sequence[SharedState]) -> SharedState:
        """Put the rows of several states into one batch; those of the first stay where they are if there is room."""
        self._graph.session()
        first, others = states[0], states[1:]
        if not others:
            return first
        lengths = np.concatenate([one.lengths for one in states])
        capacity = max(one.room.capacity for one in states)
        joined = SharedState(first.room, first.start, lengths, first.bindings)
        place = len(first.lengths)
        if first.room.capacity < capacity or first.start + len(lengths) > first.room.places:
            joined, place, others = SharedState(self._roomy(len(lengths), capacity), 0, lengths), 0, states
        for one in others:
            for row, tokens in enumerate(one.lengths.tolist()):
                joined.room.take(joined.start + place, one.room, one.start + row, tokens)
                place += 1
        return joined

    def rewind(self, state: SharedState, lengths: IntArray) -> SharedState:
        """Let each row forget all but its first tokens; what it forgets is overwritten later."""
        self._graph.session()
        state.lengths = check_rewind(lengths, state.lengths)
        return state

    def copy(self, state: SharedState, *, capacity: int | None = None) -> SharedState:
        """Make an independent copy, of what the rows hold and no more."""
        self._graph.session()
        batch = len(state.lengths)
        slots = state.room.capacity if capacity is None else self._capacity(capacity)
        room = Room(self._tensors, batch, max(slots, int(state.lengths.max())))
        for row, tokens in enumerate(state.lengths.tolist()):
            room.take(row, state.room, state.start + row, tokens)
        return SharedState(room, 0, state.lengths.copy())

    def report(self) -> EngineReport:
        """Say which provider computes, with how many threads."""
        return self._graph.report(state="shared cache", deterministic=self._deterministic)

    def close(self) -> None:
        """Release the session; calls that are inside it stop with `ClosedError`."""
        self._graph.close()
        for binding in list(self._bound):
            binding.release()

    def tap_names(self) -> list[str]:
        """Names of the modules whose output the graph can show."""
        return self._graph.tap_names()

    def taps(
        self, input_ids: IntArray, names: Sequence[str], source: AnyArray | None = None
    ) -> Mapping[str, AnyArray]:
        """Run ids from an empty state with the named module outputs added to the graph's outputs."""
        return self._graph.taps(input_ids, names, capacity=np.shape(input_ids)[1])

    def _together(self, state: SharedState, batch: int, width: int) -> bool:
        """Whether rows can be read in one run, and are the same as each by itself."""
        if width == 1:
            return not self._deterministic
        # Several rows that have a past take one token each: the attention kernel knows no more.
        return not state.lengths.any() and batch * width <= _MOST_TOKENS

    def _read_row(self, ids: IntArray, state: SharedState, *, last_only: bool) -> AnyArray:
        """Read `(1, sequence)` tokens of a row, in runs of a bounded number of tokens."""
        width = ids.shape[1]
        parts = -(-width // _MOST_TOKENS)
        if parts == 1:
            return self._run(ids, np.array([width]), state, last_only=last_only)
        # Parts of equal width: one of a single token would be computed by another kernel.
        edges = np.linspace(0, width, parts + 1).astype(np.int64).tolist()
        logits = self._empty(1, 1 if last_only else width)
        for left, right in itertools.pairwise(edges):
            part = SharedState(state.room, state.start, state.lengths + left, state.bindings)
            given = self._run(ids[:, left:right], np.array([right - left]), part, last_only=last_only)
            logits[:, 0 if last_only else slice(left, right)] = given[:, 0] if last_only else given
        return logits

    def _run(self, ids: IntArray, new: IntArray, state: SharedState, *, last_only: bool) -> AnyArray:
        """Run the graph once; give `(batch, 1 or sequence, vocab_size)` logits."""
        batch, width = ids.shape
        read = width
        longest = int(state.lengths.max())
        if width % 2 and (width > 1 or self._deterministic) and longest + width < state.room.capacity:
            ids, read = np.concatenate([ids, np.zeros_like(ids[:, :1])], axis=1), width + 1
        kept = read
        if last_only and read > 1 and self._graph.keeps_logits:
            kept = 1 + read - int(new.min())
        logits = self._empty(batch, kept)
        binding = state.bindings.get((state.start, batch))
        if binding is None:
            binding = state.bindings[state.start, batch] = Binding(
                self._graph, state.room, state.start, batch
            )
            self._bound.add(binding)
        binding.run(ids, state.lengths, new, logits)
        if not last_only:
            return logits[:, :width]
        if kept == 1:
            return logits
        last: AnyArray = logits[np.arange(batch), new - 1 - (read - kept)][:, None]
        return last

    def _make_room(self, state: SharedState, after: IntArray, width: int) -> bool:
        """See to it that rows can hold `after` tokens; say whether each has room for `width` more, too."""
        padded = int(state.lengths.max()) + width
        if after.max() > state.room.capacity:
            slots = self._capacity(max(padded, 2 * state.room.capacity))
            room = Room(self._tensors, len(after), slots)
            for row, tokens in enumerate(state.lengths.tolist()):
                room.take(row, state.room, state.start + row, tokens)
            state.room, state.start, state.bindings = room, 0, {}
        return padded <= state.room.capacity

    def _capacity(self, tokens: int) -> int:
        """Slots of a row that is to hold some tokens: with one for padding, if the context has it."""
        return max(1, min(tokens + 1, self.facts.context_length or tokens + 1))

    def _roomy(self, places: int, capacity: int) -> Room:
        """Make a room with twice the places, if possible: where a row enters, others will."""
        try:
            return Room(self._tensors, 2 * places, capacity)
        except InsufficientMemoryError:
            return Room(self._tensors, places, capacity)

    def _empty(self, batch: int, positions: int) -> AnyArray:
        """Make an array for logits: the caller's own, so that nothing has to be copied for them."""
        shape = (batch, positions, self.facts.vocab_size)
        dtype = np.dtype(self._graph.dtype)
        require_memory(
            batch * positions * self.facts.vocab_size * dtype.itemsize,
            f"the logits of {batch} rows of {positions} tokens",
            "use fewer rows or tokens in a call, or last_only=True",
        )
        return np.empty(shape, dtype)

    def _check_context(self, tokens: int) -> None:
        most = self.facts.context_length
        if most is not None and tokens > most:
            raise ContextLengthError(
                f"a row would hold {tokens} tokens; the model's context is {most}. Shorten the prompt, or lower "
                "max_new_tokens"
            )
