"""What one caller at a time runs the engine with: a stream, contexts, graphs and pinned memory."""

from collections.abc import Mapping

import numpy as np

from lmopt.backends.tensorrt.blocks import Block, Group
from lmopt.backends.tensorrt.contexts import Context
from lmopt.backends.tensorrt.cuda import PinnedMemory, Planes, Stream
from lmopt.backends.tensorrt.graphs import Counts, Graphs
from lmopt.backends.tensorrt.loading import Loaded, Shape
from lmopt.backends.tensorrt.memory import Memory
from lmopt.backends.tensorrt.placing import Placing
from lmopt.signature import LOGITS
from lmopt.types import DTYPE_BYTES, AnyArray, FloatArray, IntArray


class Lane:
    """One stream of the current device and everything that must not be used by two threads at once.

    Args:
        loaded: Engine.
        groups: Of its state.
        memory: Where device memory is taken from.
        counts: Where graphs are counted; `None` leaves every step uncaptured.

    Attributes:
        stream: Where everything is queued; wait for it before anything that was queued is let go.
    """

    def __init__(
        self, loaded: Loaded, groups: tuple[Group, ...], memory: Memory, counts: Counts | None
    ) -> None:
        self._loaded = loaded
        self._groups = groups
        self._memory = memory
        self._workspace = memory.take(loaded.workspace, "the engine's scratch memory")
        self.stream = Stream()
        self._contexts: dict[int, Context] = {}
        self._graphs = Graphs(counts) if counts is not None else None
        self._placing: Placing | None = None
        self._pinned: dict[str, PinnedMemory] = {}

    def run(self, shape: Shape, feeds: Mapping[str, AnyArray], past: Block) -> Placing:
        """Queue one call of the engine.

        Args:
            shape: Sizes, of a profile that takes them.
            feeds: Name to array, of every input but the state.
            past: State before the call, of `shape.batch` rows and, unless the past is 0, `shape.past` slots.

        Returns:
            Where the results will stand, until the next call.

        Raises:
            EngineError: TensorRT refuses.
            InsufficientMemoryError: The device is full.
        """
        replay = None
        if self._graphs is not None and shape.sequence == 1:
            key = shape, past.buffer.address
            replay = self._graphs.find(key, lambda: self._prepared(shape, past), self.stream)
        if replay is not None:
            placing = replay.placing
        else:
            if self._placing is None or self._placing.shape != shape:
                self._placing = None  # its memory may be what the next one is made of
                self._placing = Placing(self._loaded, self._groups, self._memory, shape)
            placing = self._placing
        placing.send(feeds, self._host("input", placing.input_bytes), self.stream)
        if replay is not None:
            replay.run()
        else:
            context = self._contexts.get(shape.profile)
            if context is None:
                context = self._contexts[shape.profile] = self._new_context(shape.profile)
            context.prepare(shape, placing.addresses(past))
            context.run()
        return placing

    def logits(self, placing: Placing, columns: IntArray | None, into: FloatArray) -> None:
        """Bring logits to the host, and wait for all that was queued.

        Args:
            placing: Of the call.
            columns: `(batch,)` the one column that is wanted of each row, -1 where none is; `None`: all.
            into: `(batch, sequence, vocab_size)`, or `(batch, vocab_size)` where columns are given. Rows of which
                nothing is wanted are left alone.
        """
        spec = next(one for one in self._loaded.plan.outputs if one.name == LOGITS)
        vocab_size, width = into.shape[-1], placing.shape.sequence
        line = vocab_size * DTYPE_BYTES[spec.dtype]
        count = into.size // vocab_size
        raw = "uint16" if spec.dtype == "bfloat16" else spec.dtype
        pinned = self._host("output", count * line)
        rows: IntArray | slice = slice(None)
        if columns is None:
            self.stream.copy(pinned.address, placing.logits, count * line)
        elif (rows := np.flatnonzero(columns >= 0)).size == len(columns) and (columns == columns[0]).all():
            source = Planes(placing.logits + int(columns[0]) * line, width * line, len(rows))
            self.stream.copy_box(Planes(pinned.address, line, len(rows)), source, line, len(rows), 1)
        else:
            for row in rows.tolist():
                start = placing.logits + (row * width + int(columns[row])) * line
                self.stream.copy(pinned.address + row * line, start, line)
        self.stream.wait()
        found = pinned.array(raw, into.shape)[rows]
        if spec.dtype == "bfloat16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        into[rows] = found

    def best(self, placing: Placing) -> tuple[FloatArray, IntArray]:
        """Bring the largest logits of each row to the host, and wait for all that was queued.

        Args:
            placing: Of a call of an engine that finds them.

        Returns:
            `(batch, best)` values, float32, and ids, int64; valid until the next call.
        """
        assert placing.best is not None
        sizes = placing.shape.batch, self._loaded.best
        start, end = placing.best[0], placing.best[1] + sizes[0] * sizes[1] * 8
        pinned = self._host("output", end - start)
        self.stream.copy(pinned.address, start, end - start)
        self.stream.wait()
        return pinned.array("float32", sizes), pinned.array("int64", sizes, placing.best[1] - start)

    def destroy(self) -> None:
        """Give everything back; the stream must be idle."""
        if self._graphs is not None:
            self._graphs.destroy()
        self._contexts.clear()
        self._placing = None
        for one in self._pinned.values():
            one.free()
        self._pinned.clear()
        self.stream.destroy()

    def _prepared(self, shape: Shape, past: Block) -> tuple[Context, Placing]:
        """Make a context and places that nothing else will use, for a graph."""
        context = self._new_context(shape.profile)
        placing = Placing(self._loaded, self._groups, self._memory, shape)
        context.prepare(shape, placing.addresses(past))
        return context, placing

    def _new_context(self, profile: int) -> Context:
        return Context(self._loaded, profile, self.stream, self._workspace)

    def _host(self, what: str, size: int) -> PinnedMemory:
        """Give pinned memory, which grows to what was ever needed; nothing queued may still use it."""
        there = self._pinned.get(what)
        if there is None or there.size < size:
            if there is not None:
                del self._pinned[what]
                there.free()
            there = self._pinned[what] = PinnedMemory(max(size, 1))
        return there
