"""What the engine remembers of a batch: a block of device memory, and which of its slots hold tokens."""

from dataclasses import dataclass
from typing import Final

from lmopt.backends.tensorrt.blocks import Block
from lmopt.signature import ArrayState
from lmopt.types import IntArray

STEP: Final = 64
"""Slots by which a short cache grows; a longer one grows by an eighth of itself, in this unit."""
_AHEAD: Final = 1024
"""Most slots that are made ahead for tokens that somebody said would come."""


@dataclass(slots=True)
class DeviceState:
    """Rows of a batch.

    Attributes:
        block: Their state tensors; slots behind the last that is in use hold zeros or what was forgotten.
        book: Lengths, and the mask, which has one column for each slot in use. Its `tensors` stay empty.
        capacity: Tokens that a row is said to hold in the end, 0 where nobody said it.
    """

    block: Block
    book: ArrayState
    capacity: int = 0

    @property
    def lengths(self) -> IntArray:
        """`(batch,)` int64, tokens that each row has read so far."""
        return self.book.lengths

    @property
    def used(self) -> int:
        """Slots in use, the same for every row."""
        return int(self.book.mask.shape[1])


def slots_for(used: int, capacity: int, *, most: int) -> int:
    """Choose how many slots a cache is given: seldom another number, as each is another shape for TensorRT.

    Kernels read all slots, used or not, so that it must not be many more than needed either.

    Args:
        used: Slots that must be there.
        capacity: Slots that are said to be needed in the end.
        most: Slots that the largest profile takes.

    Returns:
        At least `used`; more than `most` only where `used` is.
    """
    wanted = max(used, min(capacity, used + _AHEAD))
    step = max(STEP, wanted // 8 // STEP * STEP)
    return max(used, min(most, -(-wanted // step) * step))
