"""Remove attention heads: whole groups of query heads with their key-value head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lmopt.compression.pieces import check_scoring, check_share, highest
from lmopt.compression.step import plain_fields
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class PruneHeads:
    """Removes the key-value heads, each with the query heads that read it, that carry the least.

    Every layer keeps as many, so that the result is a plain dense model with an own `head_dim` in its
    configuration, which any transformers loads; its key-value cache shrinks alike.

    Attributes:
        share: Part of the groups to remove, more than 0 and less than 1, met to the nearest whole group.
        keep: Groups to keep instead, at least 1. Exactly one of the two is given.
        score: `"activation"`: root of the energy of a group's outputs on the calibration texts times the
            norms of the columns that read them; `"weight"`: product of the norms of all of its weights.
        refit: Let the groups that stay make up for the removed ones, by least squares on the calibration
            texts, layer by layer; see `lmopt.compression.pieces.refit`.
        damping: Ridge of that regression, as a share of each input's energy; at least 0.

    Raises:
        UnsupportedOptionError: A value is impossible.
    """

    name: ClassVar[str] = "prune_heads"
    reads_sources: ClassVar[bool] = True
    target: ClassVar[str] = "lmopt.backends.torch.structure:prune_heads"

    share: float | None = None
    keep: int | None = None
    score: Literal["activation", "weight"] = "activation"
    refit: bool = True
    damping: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        if (self.share is None) == (self.keep is None):
            raise UnsupportedOptionError(
                f"share is {self.share!r} and keep is {self.keep!r}; give exactly one: PruneHeads(share=0.25), or "
                "PruneHeads(keep=2) for two key-value heads a layer"
            )
        if self.share is not None:
            check_share(self.share)
        if self.keep is not None and (type(self.keep) is not int or self.keep < 1):
            raise UnsupportedOptionError(f"keep is {self.keep!r}; expected a whole number of at least 1")
        check_scoring(self.score, self.damping)

    @property
    def needs_texts(self) -> bool:
        """Whether the score or the regression needs calibration texts."""
        return self.refit or self.score == "activation"

    def choose(self, scores: Mapping[str, FloatArray]) -> dict[str, IntArray]:
        """Choose the groups that stay.

        Args:
            scores: By layer, `(groups,)` float32.

        Returns:
            By layer, the places of the groups that stay, in order.

        Raises:
            UnsupportedOptionError: Nothing would go, or nothing stay.
        """
        return {path: highest(one, self._count(len(one))) for path, one in scores.items()}

    def _count(self, groups: int) -> int:
        if self.keep is not None:
            if self.keep >= groups:
                raise UnsupportedOptionError(
                    f"keep is {self.keep}, and a layer has {groups} key-value heads; expected 1 to {groups - 1}"
                )
            return self.keep
        assert self.share is not None
        kept = max(1, round((1 - self.share) * groups))
        if kept >= groups:
            raise UnsupportedOptionError(
                f"share {self.share:g} of {groups} key-value heads is less than half of one, so none would go; the "
                f"least share here is {1 / groups:.3g}"
            )
        return kept

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe."""
        return plain_fields(self)
