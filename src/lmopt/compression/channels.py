"""Remove channels of MLPs: narrower, plain dense layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from lmopt.compression.pieces import check_scoring, check_share, highest
from lmopt.compression.step import plain_fields
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class PruneChannels:
    """Removes the intermediate channels of MLPs that carry the least: rows of gate and up, columns of down.

    The result is a plain dense model. With `uniform` any transformers loads its folder; without, the
    layers' widths differ, which transformers' own configuration cannot say: `config.json` then has the field
    `lmopt_widths`, and lmopt alone loads the folder (its exports run everywhere).

    Attributes:
        share: Part of the channels to remove, more than 0 and less than 1; met to the nearest `multiple`.
        score: `"activation"`: root mean square of a channel on the calibration texts times the norm of its
            column (Wanda, arXiv:2306.11695, by column as in FLAP, arXiv:2312.11983); `"weight"`: product of
            the norms of its rows and its column.
        uniform: Give every layer the same width. Otherwise the scores of all layers, standardized by layer as
            in FLAP, are ranked together; channels that carry nothing go first.
        multiple: Widths are whole multiples of this; processors compute odd widths more slowly.
        refit: Let the channels that stay make up for the removed ones, by least squares on the calibration
            texts, layer by layer; see `lmopt.compression.pieces.refit`.
        damping: Ridge of that regression, as a share of each channel's energy; at least 0. Small values fit the
            calibration texts and lose on others where these are few.

    Raises:
        UnsupportedOptionError: A value is impossible.
    """

    name: ClassVar[str] = "prune_channels"
    reads_sources: ClassVar[bool] = True
    target: ClassVar[str] = "lmopt.backends.torch.structure:prune_channels"

    share: float = 0.25
    score: Literal["activation", "weight"] = "activation"
    uniform: bool = True
    multiple: int = 16
    refit: bool = True
    damping: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        check_share(self.share)
        if type(self.multiple) is not int or self.multiple < 1:
            raise UnsupportedOptionError(
                f"multiple is {self.multiple!r}; expected a whole number of at least 1"
            )
        check_scoring(self.score, self.damping)

    @property
    def needs_texts(self) -> bool:
        """Whether the score or the regression needs calibration texts."""
        return self.refit or self.score == "activation"

    def choose(self, scores: Mapping[str, FloatArray]) -> dict[str, IntArray]:
        """Choose the channels that stay.

        Args:
            scores: By layer, `(channels,)` float32.

        Returns:
            By layer, the places of the channels that stay, in order.

        Raises:
            UnsupportedOptionError: The share is less than half a multiple, or leaves nothing.
        """
        widths = [len(one) for one in scores.values()]
        if self.uniform:
            counts = [self._width(width) for width in widths]
        else:
            total = self._width(sum(widths))
            standard = [_standardized(one) for one in scores.values()]
            bar = np.sort(np.concatenate(standard))[::-1][total - 1]
            counts = _in_multiples(
                [int((one >= bar).sum()) for one in standard], widths, total, self.multiple
            )
        return {path: highest(one, count) for (path, one), count in zip(scores.items(), counts, strict=True)}

    def _width(self, width: int) -> int:
        kept = max(1, round((1 - self.share) * width / self.multiple)) * self.multiple
        if kept >= width:
            raise UnsupportedOptionError(
                f"share {self.share:g} of {width} channels is less than half of multiple={self.multiple}, so none "
                f"would go; the least share here is {self.multiple / width:.3g}, or give a smaller multiple"
            )
        return kept

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe."""
        return plain_fields(self)


def _standardized(scores: FloatArray) -> FloatArray:
    spread = float(scores.std())
    standard: FloatArray = (scores - scores.mean()) / np.float32(spread if spread > 0 else 1)
    # Where many channels are dead, the living ones of another layer may lie further below their mean.
    return np.where(scores == 0, np.float32(-np.inf), standard)


def _in_multiples(counts: Sequence[int], widths: Sequence[int], total: int, multiple: int) -> list[int]:
    """Round widths down to multiples, then give what is missing to those that lost most by it."""
    made = [max(multiple, count // multiple * multiple) for count in counts]
    by_loss = sorted(range(len(made)), key=lambda place: made[place] - counts[place])
    for place in by_loss:
        if sum(made) + multiple <= total and made[place] + multiple <= widths[place]:
            made[place] += multiple
    return [min(one, width) for one, width in zip(made, widths, strict=True)]
