"""Decode steps captured as CUDA graphs, so that the host queues one thing for a token and not hundreds.

A captured run has its shapes and addresses in it. Both stay the same for many tokens here, because a cache is
read with slots to spare, which the mask hides, and because memory that comes back is given out again. A graph is
known by (shape, address of the cache), has a context of its own as NVIDIA asks for, and is run once uncaptured
before it is captured, so that whatever TensorRT sets up for a new shape is not part of it.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lmopt.backends.tensorrt.contexts import Context
from lmopt.backends.tensorrt.cuda import CapturedGraph, Stream
from lmopt.backends.tensorrt.loading import Shape
from lmopt.backends.tensorrt.placing import Placing
from lmopt.errors import DeviceError, EngineError

_MOST: Final = 8
"""Graphs of a stream; each holds a context and the outputs of a step."""
_REMEMBERED: Final = 64
"""Keys that are remembered to have come by once: one that comes again is worth a graph."""

Key = tuple[Shape, int]


@dataclass(slots=True)
class Counts:
    """What became of the steps that could have been replayed.

    Attributes:
        captured: Graphs that were made.
        replayed: Steps that a graph did.
        uncaptured: Steps that were queued kernel by kernel.
        refused: Why a capture failed, the last time; empty where none did.
    """

    captured: int = 0
    replayed: int = 0
    uncaptured: int = 0
    refused: str = ""


class Replay:
    """A decode step of one shape at one address: run as it is first, captured then, replayed from then on."""

    def __init__(self, context: Context, placing: Placing, stream: Stream, counts: Counts) -> None:
        self.placing = placing
        self._context = context
        self._stream = stream
        self._counts = counts
        self._graph: CapturedGraph | None = None
        self._ran = False
        self._gave_up = False

    def run(self) -> None:
        """Queue the step.

        Raises:
            EngineError: TensorRT refuses to run it at all.
        """
        if self._graph is None and self._ran and not self._gave_up:
            self._capture()
        if self._graph is not None:
            self._stream.launch(self._graph)
            self._counts.replayed += 1
            return
        self._context.run()
        self._ran = True
        self._counts.uncaptured += 1

    def destroy(self) -> None:
        """Give the graph back; it must not be running."""
        if self._graph is not None:
            self._graph.destroy()

    def _capture(self) -> None:
        self._stream.begin_capture()
        try:
            self._context.run()
        except BaseException as error:
            self._stream.drop_capture()
            if not isinstance(error, EngineError):
                raise
            self._give_up(error)
            return
        try:
            self._graph = self._stream.end_capture()
        except DeviceError as error:
            self._stream.drop_capture()
            self._give_up(error)
            return
        self._counts.captured += 1

    def _give_up(self, error: Exception) -> None:
        """Run uncaptured from now on, which gives the same numbers, and say so in the report."""
        self._gave_up = True
        self._counts.refused = str(error)


class Graphs:
    """The graphs of one stream, a bounded number.

    Args:
        counts: Where to count.
    """

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._replays: OrderedDict[Key, Replay] = OrderedDict()

    def find(self, key: Key, make: Callable[[], tuple[Context, Placing]], stream: Stream) -> Replay | None:
        """Give the replay of a step that came by before.

        Args:
            key: Shape, and address of the cache.
            make: Makes the context and the places of a new replay, prepared.
            stream: Where it runs.

        Returns:
            `None` for a key that is seen for the first time, or not in a long while.
        """
        if key in self._replays:
            self._replays.move_to_end(key)
            return self._replays[key]
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            self._counts.uncaptured += 1
            return None
        del self._seen[key]
        while len(self._replays) >= _MOST:
            self._replays.popitem(last=False)[1].destroy()
        context, placing = make()
        self._replays[key] = Replay(context, placing, stream, self._counts)
        return self._replays[key]

    def destroy(self) -> None:
        """Give all graphs back; none may be running."""
        for one in self._replays.values():
            one.destroy()
        self._replays.clear()
