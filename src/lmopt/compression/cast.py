"""Store and compute in a half precision type, except where its range does not suffice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from lmopt.compression.overrides import check_names
from lmopt.compression.step import plain_fields
from lmopt.errors import UnsupportedOptionError

LARGEST: Final = {"float16": 65504.0, "bfloat16": 3.3895e38}
"""Largest finite number of each type."""
SMALLEST: Final = {"float16": 2.0**-14, "bfloat16": 2.0**-126}
"""Smallest number of each type that has all of its digits."""


@dataclass(frozen=True, slots=True)
class Cast:
    """Half the memory: weights and activations in 16 bits; modules that would overflow stay in float32.

    The model reads the calibration texts once, in float32. Where something that a module reads or gives comes
    within `headroom` of the type's largest number, the module stays in float32, and so does the one around it
    where the number arises between modules. Without texts only weights are looked at. A module whose weights are all
    too small for the type stays in float32 too.

    Attributes:
        dtype: `"float16"`, 10 bits of fraction and numbers up to 65504; or `"bfloat16"`, 7 bits and the range of
            float32.
        keep: Paths, or patterns with `*`, of modules that stay in float32 in any case.
        headroom: How far below the largest number activations must stay: other texts reach further than those
            that were shown.

    Raises:
        UnsupportedOptionError: A value is impossible.
    """

    name: ClassVar[str] = "cast"
    needs_texts: ClassVar[bool] = False
    takes_texts: ClassVar[bool] = True
    target: ClassVar[str] = "lmopt.backends.torch.casting:cast"

    dtype: Literal["float16", "bfloat16"] = "float16"
    keep: Sequence[str] = ()
    headroom: float = 8.0

    def __post_init__(self) -> None:
        """Check every field."""
        if self.dtype not in LARGEST:
            raise UnsupportedOptionError(f"dtype is {self.dtype!r}; expected one of {', '.join(LARGEST)}")
        if isinstance(self.keep, str):
            raise UnsupportedOptionError(
                f"keep is {self.keep!r}; expected a list of patterns: [{self.keep!r}]"
            )
        if isinstance(self.headroom, bool) or not 1 <= self.headroom <= 1e4:
            raise UnsupportedOptionError(f"headroom is {self.headroom!r}; expected a number from 1 to 10000")

    @property
    def limit(self) -> float:
        """Largest activation that a module in the type may have."""
        return LARGEST[self.dtype] / self.headroom

    def check_names(self, paths: Iterable[str]) -> None:
        """Refuse patterns that match no module.

        Raises:
            UnsupportedOptionError: With near matches.
        """
        check_names(dict.fromkeys(self.keep), paths)

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe."""
        return plain_fields(self)
