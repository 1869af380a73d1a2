"""Quantize weights by rounding each to the nearest code (RTN)."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

from lmopt.compression.layout import Grid, QuantizedArray, check_form, quantize
from lmopt.compression.overrides import Overrides, Part, check_fields, check_names, matching
from lmopt.compression.statistics import Statistics
from lmopt.compression.step import plain_fields
from lmopt.types import FloatArray

_OVERRIDABLE: Final = frozenset({"bits", "group_size", "symmetric"})


@dataclass(frozen=True, slots=True)
class Form:
    """How one weight is quantized.

    Attributes:
        bits: Width of a code.
        group_size: Columns that share a scale.
        symmetric: Whether zero is the middle code.
    """

    bits: int
    group_size: int
    symmetric: bool

    def grid(self, rows: int, columns: int) -> Grid:
        """Give the form of a weight of this size."""
        zero = "symmetric" if self.symmetric else "integer"
        return Grid(rows, columns, self.bits, self.group_size, zero)


@dataclass(frozen=True, slots=True)
class Quantize:
    """Weights as `bits`-bit codes in groups that share a scale; activations stay as they are.

    Rounds each weight to the nearest code: no calibration, the loss is what it is.

    Attributes:
        bits: Width of a code, 2 to 8.
        group_size: Columns (inputs) that share a scale. A last group that is not full is padded.
        symmetric: Whether zero is the middle code; otherwise each group has a whole zero point.
        embedding: Bits of the token embedding; `None` leaves it in float. A small model suffers from
            4 bits here and in the head more than anywhere else.
        head: Bits of the linear that makes the logits. Where it is tied to the embedding, both are one
            weight and must agree.
        overrides: Module path, or pattern with `*`, to what differs there: fields `bits`,
            `group_size`, `symmetric`, or `None` to leave it in float. The last one that matches counts.

    Raises:
        UnsupportedOptionError: A value is impossible.

    Example:
        >>> Quantize(bits=4, group_size=64, overrides={"*.down_proj": {"bits": 8}}).form("x.down_proj", "linear")
        Form(bits=8, group_size=64, symmetric=True)
    """

    name: ClassVar[str] = "rtn"
    needs_texts: ClassVar[bool] = False
    target: ClassVar[str] = "lmopt.backends.torch.compressing:by_matrix"

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    embedding: int | None = 8
    head: int | None = 8
    overrides: Overrides = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        for bits in (self.bits, self.embedding, self.head):
            if bits is not None:
                check_form(bits, self.group_size)
        check_fields(self.overrides, _OVERRIDABLE)
        for changes in self.overrides.values():
            if changes is not None:
                check_form(changes.get("bits", self.bits), changes.get("group_size", self.group_size))

    def form(self, path: str, part: Part) -> Form | None:
        """Say how the weight of the module at `path` is quantized, `None` for not at all."""
        bits = {"linear": self.bits, "embedding": self.embedding, "head": self.head}[part]
        form = None if bits is None else Form(bits, self.group_size, self.symmetric)
        for changes in matching(self.overrides, path):
            base = form or Form(self.bits, self.group_size, self.symmetric)
            form = None if changes is None else replace(base, **changes)
        return form

    def overridden(self, path: str) -> bool:
        """Whether an override matches the weight at `path`."""
        return any(True for _ in matching(self.overrides, path))

    def check_names(self, paths: Iterable[str]) -> None:
        """Refuse overrides that match no weight.

        Raises:
            UnsupportedOptionError: With near matches.
        """
        check_names(self.overrides, paths)

    def apply(
        self, weight: FloatArray, form: Form, name: str, statistics: Statistics | None = None
    ) -> QuantizedArray:
        """Quantize one weight.

        Args:
            weight: `(rows, columns)` float32.
            form: From `form`.
            name: Name of the weight, for messages.
            statistics: What the linear has read; none are needed here. A method that needs them rounds a
                weight without any (an embedding, a head that is tied to one) to the nearest code.

        Raises:
            InputError: It holds NaN or infinity.
        """
        return quantize(weight, form.bits, form.group_size, symmetric=form.symmetric, what=name)

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe."""
        return plain_fields(self)
