"""Run an exported decoder as a TensorRT engine; its state stays on the device."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import numpy as np

from lmopt.accelerators import CudaDevice
from lmopt.backends.tensorrt import cuda
from lmopt.backends.tensorrt.best import settled
from lmopt.backends.tensorrt.blocks import Block, groups_of
from lmopt.backends.tensorrt.graphs import Counts
from lmopt.backends.tensorrt.lane import Lane
from lmopt.backends.tensorrt.loading import Loaded
from lmopt.backends.tensorrt.memory import Memory
from lmopt.backends.tensorrt.placing import Placing
from lmopt.backends.tensorrt.reporting import report_of
from lmopt.backends.tensorrt.state import DeviceState, slots_for
from lmopt.checking import whole_numbers
from lmopt.contracts import EngineReport, PaddingSide
from lmopt.errors import ClosedError, ContextLengthError, ShapeError, UnsupportedOptionError
from lmopt.signature import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, ArrayState, Step
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts

_Read = Callable[[Placing, slice, int, int], None]


class TensorRTEngine:
    """One plan on one device.

    A cache has slots to spare, so that many tokens are read with one shape: the mask hides the slots that hold
    nothing. A graph without mask or positions cannot be told so; its cache has as many slots as there are tokens, and
    every token is another shape.

    Each thread that is inside a method has a stream and contexts of its own, which the next thread reuses. Every
    method waits for what it queued before it returns, so that states may go from one thread to another.

    Args:
        loaded: Plan on the device; given back by `close`.
        facts: Facts of the model.
        device: Where it is; it must be the current device.
        cuda_graphs: Whether decode steps may be captured and replayed.

    Attributes:
        most_best: Most logits of a row that are found on the device; 0 where the engine was built without.
    """

    def __init__(self, loaded: Loaded, facts: ModelFacts, device: CudaDevice, *, cuda_graphs: bool) -> None:
        self.facts = facts
        self.most_best = loaded.best
        self._loaded: Loaded | None = loaded
        self._signature = loaded.signature
        self._device = device
        self._groups = groups_of(loaded.signature.state)
        self._memory = Memory(device.index)
        self._counts = Counts()
        self._spare = self._signature.has_mask and self._signature.has_positions
        stable = self._spare or not self._signature.grows
        self._capture = cuda_graphs and stable and not loaded.captures_itself
        self._lanes: list[Lane] = []
        self._lock = threading.Lock()

    @property
    def ragged(self) -> bool:
        """Whether rows may be unequal: whether the graph takes a mask."""
        return self._signature.has_mask

    @property
    def rewinds(self) -> bool:
        """Whether rows can forget their last tokens: whether the state is a cache and nothing else."""
        return self._signature.rewinds

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> DeviceState:
        """Make the empty state of `batch` rows; its memory grows with the rows, in steps.

        Raises:
            ContextLengthError: Neither the model nor the engine can read as many tokens.
            InsufficientMemoryError: The device is full.
        """
        self._check_length(capacity or 0)
        with self._lane() as lane:
            book = ArrayState({}, np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64), padding_side)
            return DeviceState(self._zeroed(lane, batch, 0), book, capacity or 0)

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: DeviceState, *, last_only: bool = False
    ) -> tuple[FloatArray, DeviceState]:
        """Read new tokens; see `lmopt.contracts.Engine.forward`.

        Calls that are larger than any profile are made in parts: tokens one after the other, and rows too, which
        then are copied together and costs time; `max_batch` of the build decides.

        Raises:
            ContextLengthError: A row would hold more tokens than the model, or the engine, can read.
            InsufficientMemoryError: The device is full.
            EngineError: TensorRT failed, with its words.
        """
        with self._lane() as lane:
            step = self._signature.step(input_ids, lengths, state.book)
            self._check_length(int(step.lengths.max()))
            batch, width = input_ids.shape
            last = np.full(batch, width - 1) if step.padding_side == "left" else step.new - 1
            sizes = (batch, self.facts.vocab_size) if last_only else (batch, width, self.facts.vocab_size)
            logits = np.empty(sizes, np.float32)

            def read(placing: Placing, rows: slice, start: int, stop: int) -> None:
                if not last_only:
                    lane.logits(placing, None, logits[rows, start:stop])
                    return
                inside = (last[rows] >= start) & (last[rows] < stop)
                lane.logits(placing, np.where(inside, last[rows] - start, -1), logits[rows])

            after = self._read(lane, state, step, read)
            return logits[:, None] if last_only else step.align(logits, last_only=False), after

    def forward_best(
        self, input_ids: IntArray, state: DeviceState, count: int
    ) -> tuple[list[FloatArray], list[IntArray | None], DeviceState]:
        """Read one new token a row and hand out its largest logits; see `lmopt.contracts.SupportsBest`.

        Raises:
            UnsupportedOptionError: The engine was built to find fewer.
        """
        if not 1 <= count <= self.most_best or input_ids.shape[1:] != (1,):
            raise UnsupportedOptionError(
                f"{count} logits of {input_ids.shape} tokens were asked for; this engine finds 1 to "
                f"{self.most_best} after one token a row. Open it with best_logits={count} or more"
            )
        with self._lane() as lane:
            step = self._signature.step(input_ids, np.ones(len(input_ids), np.int64), state.book)
            self._check_length(int(step.lengths.max()))
            logits: list[FloatArray] = []
            ids: list[IntArray | None] = []

            def read(placing: Placing, rows: slice, start: int, stop: int) -> None:
                size = self.facts.vocab_size
                found = [settled(*one, count, size) for one in zip(*lane.best(placing), strict=True)]
                open_rows = [one is None for one in found]
                whole = np.empty((len(found) if any(open_rows) else 0, size), np.float32)
                if any(open_rows):
                    lane.logits(placing, np.where(open_rows, 0, -1), whole)
                logits.extend(whole[n] if one is None else one[0] for n, one in enumerate(found))
                ids.extend(None if one is None else one[1] for one in found)

            after = self._read(lane, state, step, read)
            return logits, ids, after

    def select(self, state: DeviceState, rows: IntArray) -> DeviceState:
        """Keep, drop, reorder or repeat rows; neighbours that stay neighbours are copied together."""
        with self._lane() as lane:
            rows = whole_numbers(rows, "rows")
            batch = len(state.lengths)
            if rows.ndim != 1 or not rows.size or rows.min() < 0 or rows.max() >= batch:
                raise ShapeError(
                    f"rows are {rows.tolist()}; the state has {batch}, of which one or more stay"
                )
            if np.array_equal(rows, np.arange(batch)):
                return state
            block = self._zeroed(lane, len(rows), state.block.slots)
            edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
            for left, right in itertools.pairwise(edges):
                source = int(rows[left])
                block.take(
                    lane.stream, state.block, row=left, source_row=source, rows=right - left, slots=state.used
                )
            lane.stream.wait()
            old = state.book
            book = ArrayState({}, old.mask[rows], old.lengths[rows], old.padding_side)
            return DeviceState(block, book, state.capacity)

    def join(self, states: Sequence[DeviceState]) -> DeviceState:
        """Put the rows of several states into one batch, padding shorter pasts at the left."""
        with self._lane() as lane:
            if len(states) == 1:
                return states[0]
            books = [one.book for one in states]
            pads = self._signature.pads(books)
            capacity = max(one.capacity for one in states)
            used = max(one.used for one in states)
            block = self._zeroed(lane, sum(len(one.lengths) for one in states), self._slots(used, capacity))
            row = 0
            for one, pad in zip(states, pads, strict=True):
                count = len(one.lengths)
                block.take(lane.stream, one.block, row=row, rows=count, slot=pad, slots=one.used)
                row += count
            lane.stream.wait()
            masks = [np.pad(one.mask, ((0, 0), (pad, 0))) for one, pad in zip(books, pads, strict=True)]
            lengths = np.concatenate([one.lengths for one in books])
            return DeviceState(
                block, ArrayState({}, np.concatenate(masks), lengths, books[0].padding_side), capacity
            )

    def rewind(self, state: DeviceState, lengths: IntArray) -> DeviceState:
        """Let each row forget all but its first tokens; what it forgets is hidden, and written over later."""
        with self._lane() as lane:
            kept, mask, used = self._signature.forget(state.book, lengths)
            block = state.block
            if not self._spare and used < state.used:
                block = self._moved(lane, state, used, self._slots(used, 0))
            return DeviceState(block, ArrayState({}, mask, kept, state.book.padding_side), state.capacity)

    def copy(self, state: DeviceState, *, capacity: int | None = None) -> DeviceState:
        """Make an independent copy."""
        wanted = state.capacity if capacity is None else capacity
        self._check_length(wanted)
        with self._lane() as lane:
            block = self._moved(lane, state, state.used, self._slots(state.used, wanted))
            old = state.book
            book = ArrayState({}, old.mask.copy(), old.lengths.copy(), old.padding_side)
            return DeviceState(block, book, wanted)

    def report(self) -> EngineReport:
        """Say what computes: GPU, TensorRT, types of the graph, and what became of graphs and memory."""
        with self._lock:
            lanes = len(self._lanes)
        return report_of(
            self._open().plan,
            self._device,
            state=("cache with spare slots" if self._spare else "growing cache")
            if self._signature.grows
            else "recurrent",
            cuda_graphs={"by": "TensorRT"}
            if self._open().captures_itself
            else {"by": "lmopt" if self._capture else "nobody", **asdict(self._counts)},
            idle_contexts=lanes,
            device_bytes=self._memory.held,
        )

    def close(self) -> None:
        """Give everything back; calls that are inside finish first, their threads give back what they use."""
        with self._lock:
            lanes, self._lanes = self._lanes, []
            loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        cuda.use_device(self._device.index)
        for lane in lanes:
            lane.destroy()
        self._memory.close()

    def _read(self, lane: Lane, state: DeviceState, step: Step, read: _Read) -> DeviceState:
        """Make a call in as many parts as the profiles ask for; `read` is given what each part leaves."""
        width = step.feeds[INPUT_IDS].shape[1]
        block, start = state.block, 0
        while start < width:
            block, start = self._columns(lane, block, state, step, start, read)
        book = ArrayState({}, step.mask, step.lengths, step.padding_side)
        return DeviceState(block, book, state.capacity)

    def _columns(
        self, lane: Lane, block: Block, state: DeviceState, step: Step, start: int, read: _Read
    ) -> tuple[Block, int]:
        """Read as many columns as a profile takes, for all rows.

        Args:
            lane: Of the caller.
            block: State before these columns.
            state: State before the whole call.
            step: The whole call.
            start: First column.
            read: Given places, rows and columns of each run, fetches what is wanted of it, and waits.

        Returns:
            The state after these columns, and the first column that is left.
        """
        loaded = self._open()
        batch, width = step.feeds[INPUT_IDS].shape
        used = state.used + start
        past = block.slots if used and self._signature.grows else 0
        shape = loaded.fit(batch, width - start, past)
        stop = start + shape.sequence
        after = self._grown(lane, block, used, used + shape.sequence, state.capacity)
        row = 0
        while row < batch:
            shape = loaded.fit(batch - row, stop - start, past)
            rows = slice(row, row + shape.batch)
            before = block if shape.batch == batch else self._part(lane, block, row, shape.batch, used)
            placing = lane.run(shape, self._feeds(step, rows, start, stop, state.used, past), before)
            after.take(
                lane.stream,
                placing.present,
                row=row,
                rows=shape.batch,
                slot=used,
                source_slot=past,
                slots=shape.sequence,
            )
            read(placing, rows, start, stop)
            row += shape.batch
        return after, stop

    def _feeds(
        self, step: Step, rows: slice, start: int, stop: int, used: int, past: int
    ) -> dict[str, AnyArray]:
        """Cut the inputs of a part out of those of a call, and hide slots that hold nothing."""
        feeds = {INPUT_IDS: step.feeds[INPUT_IDS][rows, start:stop]}
        if self._signature.has_positions:
            feeds[POSITION_IDS] = step.feeds[POSITION_IDS][rows, start:stop]
        if self._signature.has_mask:
            mask = np.zeros((feeds[INPUT_IDS].shape[0], past + stop - start), np.int64)
            mask[:, : used + start] = step.mask[rows, : used + start]
            mask[:, past:] = step.mask[rows, used + start : used + stop]
            feeds[ATTENTION_MASK] = mask
        return feeds

    def _grown(self, lane: Lane, block: Block, used: int, needed: int, capacity: int) -> Block:
        """Give a block with room for `needed` slots: the same, or a larger one with the same content."""
        if not self._signature.grows or (self._spare and block.slots >= needed):
            return block
        larger = self._zeroed(lane, block.batch, self._slots(needed, capacity))
        larger.take(lane.stream, block, rows=block.batch, slots=used)
        return larger

    def _moved(self, lane: Lane, state: DeviceState, used: int, slots: int) -> Block:
        """Copy the first slots of a state into a block of its own."""
        block = self._zeroed(lane, state.block.batch, slots)
        block.take(lane.stream, state.block, rows=block.batch, slots=used)
        lane.stream.wait()
        return block

    def _part(self, lane: Lane, block: Block, row: int, rows: int, used: int) -> Block:
        """Copy some rows of a block, in as many slots, for a profile that takes no more rows."""
        part = self._zeroed(lane, rows, block.slots)
        part.take(lane.stream, block, source_row=row, rows=rows, slots=used)
        return part

    def _zeroed(self, lane: Lane, batch: int, slots: int) -> Block:
        """Make a block of zeros; there is nothing queued on it when this returns."""
        block = Block(self._groups, self._memory, batch, slots)
        block.clear(lane.stream)
        lane.stream.wait()
        return block

    def _slots(self, used: int, capacity: int) -> int:
        if not self._spare:
            return used
        return slots_for(used, capacity, most=self._open().most_past())

    def _check_length(self, tokens: int) -> None:
        most = self.facts.context_length
        if most is not None and tokens > most:
            raise ContextLengthError(
                f"a row would hold {tokens} tokens; the model's context is {most}. Shorten the prompt, or lower "
                "max_new_tokens"
            )
        built = self._open().most_tokens()
        if self._signature.grows and tokens > built:
            raise ContextLengthError(
                f"a row would hold {tokens} tokens; this engine was built for {built}. Open it with "
                f"max_past={tokens - 1} or more, shorten the prompt, or lower max_new_tokens"
            )

    def _open(self) -> Loaded:
        loaded = self._loaded
        if loaded is None:
            raise ClosedError("this engine is closed; open a new lmopt.Runtime")
        return loaded

    @contextlib.contextmanager
    def _lane(self) -> Iterator[Lane]:
        """Lend a lane that no other thread has; whatever happens, nothing is queued on it afterwards."""
        loaded = self._open()
        cuda.use_device(self._device.index)
        with self._lock:
            lane = self._lanes.pop() if self._lanes else None
        if lane is None:
            lane = Lane(loaded, self._groups, self._memory, self._counts if self._capture else None)
        try:
            yield lane
        except BaseException:
            # Blocks go back to the pool as the error leaves: nothing may be at work on them by then. Where the
            # device itself failed, waiting fails as well, and the first error is the one to tell.
            with contextlib.suppress(Exception):
                lane.stream.wait()
            raise
        finally:
            with self._lock:
                closed = self._loaded is None
                if not closed:
                    self._lanes.append(lane)
            if closed:
                lane.destroy()
