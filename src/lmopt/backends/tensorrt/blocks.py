"""State tensors of a batch in one piece of device memory, laid out so that few copies move all of them.

Tensors of one shape stand at equal distances. Tokens of a row that go from one place to another, in every layer
at once, are then a box of bytes, and one call of CUDA copies a box.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmopt.backends.tensorrt.cuda import Planes, Stream
from lmopt.backends.tensorrt.memory import ALIGNMENT, Memory, aligned
from lmopt.errors import CorruptArtifactError
from lmopt.signature import StateTensor
from lmopt.types import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Group:
    """State tensors of one shape and type.

    Attributes:
        tensors: In the graph's order.
        grows: Whether they have an axis of tokens (called slots, as some hold none).
        repeats: Lines of a row where they grow, of a tensor where they do not.
        unit: Bytes of a slot in a line where they grow, of a row in a line where they do not.
    """

    tensors: tuple[StateTensor, ...]
    grows: bool
    repeats: int
    unit: int

    def pitch(self, batch: int, slots: int) -> int:
        """Bytes of a line."""
        return self.unit * (slots if self.grows else batch)

    def lines(self, batch: int, slots: int) -> int:
        """Lines from a tensor to the next: as many as it has, and then some until the next is aligned."""
        lines = self.repeats * (batch if self.grows else 1)
        pitch = self.pitch(batch, slots)
        step = ALIGNMENT // math.gcd(ALIGNMENT, pitch) if pitch else 1
        return max(1, -(-lines // step)) * step

    def size(self, batch: int, slots: int) -> int:
        """Bytes of all tensors of the group."""
        return aligned(len(self.tensors) * self.lines(batch, slots) * self.pitch(batch, slots))


def groups_of(tensors: Iterable[StateTensor]) -> tuple[Group, ...]:
    """Sort state tensors by shape.

    Raises:
        CorruptArtifactError: One grows, and its rows do not stand on its first axis.
    """
    found: dict[tuple[bool, int, int], list[StateTensor]] = {}
    for one in tensors:
        axis = one.batch_axis if one.past_axis is None else one.past_axis
        if one.past_axis is not None and (one.batch_axis != 0 or axis < 1):
            raise CorruptArtifactError(
                f"{one.past.name!r} has the shape {one.past.shape}; a cache that grows has its rows on the first axis"
            )
        first = 0 if one.past_axis is None else 1
        repeats = math.prod(int(size) for size in one.past.shape[first:axis])
        unit = math.prod(int(size) for size in one.past.shape[axis + 1 :]) * DTYPE_BYTES[one.past.dtype]
        found.setdefault((one.past_axis is not None, repeats, unit), []).append(one)
    return tuple(Group(tuple(same), *key) for key, same in found.items())


class Block:
    """State tensors of `batch` rows with room for `slots` tokens each.

    Args:
        groups: Of the graph's state.
        memory: Where it is taken from; its content is whatever was there.
        batch: Rows, at least 1.
        slots: Slots of each row, at least 0.

    Raises:
        InsufficientMemoryError: There is no room for it.
    """

    def __init__(self, groups: Sequence[Group], memory: Memory, batch: int, slots: int) -> None:
        self.batch = batch
        self.slots = slots
        self._groups = groups
        size = sum(group.size(batch, slots) for group in groups)
        self.buffer = memory.take(size, f"the state of {batch} rows of {slots} tokens")
        self._bases = []
        base = self.buffer.address
        for group in groups:
            self._bases.append(base)
            base += group.size(batch, slots)

    def addresses(self) -> dict[StateTensor, int]:
        """Address of each tensor."""
        found = {}
        for group, base in zip(self._groups, self._bases, strict=True):
            distance = group.lines(self.batch, self.slots) * group.pitch(self.batch, self.slots)
            found.update({one: base + index * distance for index, one in enumerate(group.tensors)})
        return found

    def clear(self, stream: Stream) -> None:
        """Write zeros: slots that hold no token yet must be finite, as a weight of 0 does not hide infinity."""
        stream.clear(self.buffer.address, self.buffer.size)

    def take(
        self,
        stream: Stream,
        source: "Block",
        *,
        row: int = 0,
        source_row: int = 0,
        rows: int,
        slot: int = 0,
        source_slot: int = 0,
        slots: int,
    ) -> None:
        """Copy slots of neighbouring rows out of another block, in every tensor that grows; and the others whole.

        Args:
            stream: Where the copies are queued.
            source: Other block.
            row: First row here.
            source_row: First row there.
            rows: Number of rows.
            slot: First slot here.
            source_slot: First slot there.
            slots: Number of slots.
        """
        for group, base, source_base in zip(self._groups, self._bases, source._bases, strict=True):
            if group.grows:
                to = group.repeats * row * group.pitch(self.batch, self.slots) + slot * group.unit
                there = group.pitch(source.batch, source.slots)
                out = group.repeats * source_row * there + source_slot * group.unit
                width, height = slots * group.unit, rows * group.repeats
            else:
                to, out = row * group.unit, source_row * group.unit
                width, height = rows * group.unit, group.repeats
            stream.copy_box(
                _planes(group, self, base + to),
                _planes(group, source, source_base + out),
                width,
                height,
                len(group.tensors),
            )


def _planes(group: Group, block: Block, address: int) -> Planes:
    size = block.batch, block.slots
    return Planes(address, group.pitch(*size), group.lines(*size))
