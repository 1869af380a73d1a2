"""Remove whole blocks: a shallower, plain dense model."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from lmopt.compression.pieces import check_share
from lmopt.compression.step import plain_fields
from lmopt.errors import InputError, UnsupportedOptionError
from lmopt.types import FloatArray


@dataclass(frozen=True, slots=True)
class DropBlocks:
    """Removes the blocks that change what runs through them the least.

    Attributes:
        count: Blocks to remove, at least 1 and fewer than there are.
        share: Part of the blocks to remove instead, more than 0 and less than 1, met to the nearest whole
            block. Exactly one of the two is given.
        score: `"block-influence"`: one minus the mean cosine between what enters and what leaves a block (Men
            et al. 2024, ShortGPT, arXiv:2403.03853), in one pass over the calibration texts; `"perplexity"`:
            remove, one after the other, the block without which the loss on the texts is least, which takes
            a pass over them for each block that is left and each that goes.

    Raises:
        UnsupportedOptionError: A value is impossible.
    """

    name: ClassVar[str] = "drop_blocks"
    needs_texts: ClassVar[bool] = True
    target: ClassVar[str] = "lmopt.backends.torch.blocks:drop_blocks"

    count: int | None = None
    share: float | None = None
    score: Literal["block-influence", "perplexity"] = "block-influence"

    def __post_init__(self) -> None:
        """Check every field."""
        if (self.count is None) == (self.share is None):
            raise UnsupportedOptionError(
                f"count is {self.count!r} and share is {self.share!r}; give exactly one: DropBlocks(count=3) or "
                "DropBlocks(share=0.1)"
            )
        if self.count is not None and (type(self.count) is not int or self.count < 1):
            raise UnsupportedOptionError(f"count is {self.count!r}; expected a whole number of at least 1")
        if self.share is not None:
            check_share(self.share)
        if self.score not in ("block-influence", "perplexity"):
            raise UnsupportedOptionError(
                f"score is {self.score!r}; expected 'block-influence' or 'perplexity'"
            )

    def number(self, blocks: int) -> int:
        """Say how many of `blocks` blocks go.

        Raises:
            UnsupportedOptionError: None would go, or none stay.
        """
        going = self.count if self.count is not None else round((self.share or 0) * blocks)
        if not 0 < going < blocks:
            raise UnsupportedOptionError(
                f"{'count' if self.count is not None else 'share'} would remove {going} of {blocks} blocks; expected "
                f"1 to {blocks - 1}"
            )
        return going

    def choose(self, influences: FloatArray) -> list[int]:
        """Choose the blocks that go, by their influence.

        Args:
            influences: `(blocks,)` float32.

        Returns:
            Their places, in order.

        Raises:
            InputError: An influence is NaN or infinite.
        """
        if not np.isfinite(influences).all():
            place = int(np.argmax(~np.isfinite(influences)))
            raise InputError(f"block {place} computes NaN or infinity: the model is damaged already")
        order = np.argsort(influences, kind="stable")[: self.number(len(influences))]
        return sorted(order.tolist())

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe."""
        return plain_fields(self)
