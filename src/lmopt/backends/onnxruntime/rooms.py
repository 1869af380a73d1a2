"""Memory for the keys and values of a batch, laid out as the kernels want it, moved as little as possible.

A *room* has a number of *places*, each for one row of up to `capacity` tokens. The rows of a batch
stand in neighbouring places, so that the batch is a plain view. Rows that leave are closed up over, rows
that enter take places that are free: memory is only copied where a row has to move.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from lmopt.errors import InsufficientMemoryError
from lmopt.platform import memory_available_bytes
from lmopt.signature import StateTensor
from lmopt.types import DTYPE_BYTES, AnyArray

_ALIGNMENT: Final = 64
"""Bytes of a cache line and of the widest vector register."""
_WORTH_ASKING: Final = 16 << 20
"""Bytes from which on it is worth the time to ask the system what is free."""


class Room:
    """Zeroed buffers for a number of places; the system gives their pages as they are first written.

    Args:
        tensors: State tensors of the graph.
        places: Rows that have room.
        capacity: Tokens that each of them has room for.

    Raises:
        InsufficientMemoryError: There is not as much memory; nothing was allocated.
    """

    def __init__(self, tensors: Sequence[StateTensor], places: int, capacity: int) -> None:
        require_memory(
            room_bytes(tensors, places, capacity),
            f"the cache of {places} rows of {capacity} tokens",
            "use a smaller batch, a shorter max_new_tokens or max_length, or shorter prompts",
        )
        self.places = places
        self.capacity = capacity
        self.arrays = [_aligned_zeros(one.sizes(places, capacity), one.past.dtype) for one in tensors]
        self._tensors = tensors

    def view(self, start: int, stop: int) -> list[AnyArray]:
        """Give the places `start .. stop - 1` of each tensor, contiguous."""
        return [array[start:stop] for array in self.arrays]

    def take(self, place: int, other: "Room", other_place: int, tokens: int) -> None:
        """Copy the first tokens of a place of a room, which may be this one."""
        for one, into, out in zip(self._tensors, self.arrays, other.arrays, strict=True):
            assert one.past_axis is not None
            some = (slice(None),) * (one.past_axis - 1) + (slice(tokens),)
            into[place][some] = out[other_place][some]

    def rearrange(self, moves: Mapping[int, int], tokens: Mapping[int, int]) -> None:
        """Copy places within the room, all at once.

        Args:
            moves: Place to the place whose content it is to get. What the others hold is kept.
            tokens: Place to how many tokens it holds, for each place that is moved from.
        """
        pending = {to: source for to, source in moves.items() if to != source}
        needed = Counter(pending.values())
        ready = [to for to in pending if not needed[to]]
        while pending:
            if not ready:
                # Only circles are left. One place steps aside, and its circle can be walked.
                to = first = next(iter(pending))
                spare = Room(self._tensors, 1, max(1, tokens[first]))
                spare.take(0, self, first, tokens[first])
                while (source := pending.pop(to)) != first:
                    self.take(to, self, source, tokens[source])
                    to = source
                self.take(to, spare, 0, tokens[first])
                continue
            to = ready.pop()
            source = pending.pop(to)
            self.take(to, self, source, tokens[source])
            needed[source] -= 1
            if not needed[source] and source in pending:
                ready.append(source)


def room_bytes(tensors: Sequence[StateTensor], places: int, capacity: int) -> int:
    """Count the bytes of a room."""
    return sum(math.prod(one.sizes(places, capacity)) * DTYPE_BYTES[one.past.dtype] for one in tensors)


def require_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse an allocation that the machine, or the container, cannot serve.

    Args:
        needed: Bytes.
        what: What it is for.
        remedy: What the caller can do.

    Raises:
        InsufficientMemoryError: Less than that is free.
    """
    if needed < _WORTH_ASKING:
        return
    free = memory_available_bytes()
    if free is not None and needed > free:
        raise InsufficientMemoryError(
            f"{what} needs {_mebibytes(needed)} of memory; {_mebibytes(free)} are free. To fit: {remedy}"
        )


def _mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"


def _aligned_zeros(shape: Sequence[int], dtype: str) -> AnyArray:
    """Make zeros that start at a cache line; the kernels read them in whole vectors."""
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
