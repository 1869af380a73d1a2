"""Quantize weights by rounding each to the nearest code (RTN)."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

from lmopt.compression.layout import Grid, QuantizedArray, check_form, quantize
from lmopt.compression.overrides import Overrides, Part, check_fields, check_names, matching
from lmopt.compression.statistics import Statistics
from lmopt.compression.step import plain_fields
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray

_OVERRIDABLE: Final = frozenset({"bits", "group_size", "symmetric", "activations"})


@dataclass(frozen=True, slots=True)
class Form:
    """How one weight is quantized.

    Attributes:
        bits: Width of a code.
        group_size: Columns that share a scale.
        symmetric: Whether zero is the middle code.
        activations: Bits that a linear rounds what it reads to, `None` for not at all.
        scale_bits: 16 for scales that half precision holds, 32 for others.
        offset: Whether the zero of a group that is not symmetric is a float offset.
    """

    bits: int
    group_size: int
    symmetric: bool
    activations: int | None = None
    scale_bits: int = 32
    offset: bool = False

    @property
    def half(self) -> bool:
        """Whether scales are rounded to half precision."""
        return self.scale_bits == 16

    def grid(self, rows: int, columns: int) -> Grid:
        """Give the form of a weight of this size."""
        zero = "symmetric" if self.symmetric else "offset" if self.offset else "integer"
        return Grid(rows, columns, self.bits, self.group_size, zero)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes that a weight of this size takes in a file."""
        grid = self.grid(rows, columns)
        floats = 2 if grid.zero == "offset" else 1
        return grid.nbytes() - (2 * floats * rows * grid.groups if self.half else 0)


@dataclass(frozen=True, slots=True)
class Quantize:
    """Weights as `bits`-bit codes in groups that share a scale, activations in float or in 8 bits.

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
            `group_size`, `symmetric`, `activations`, or `None` to leave it in float. The last one that
            matches counts.
        activations: 8 rounds what each linear reads to 8 bits while it runs: each token by itself, in blocks
            of columns (the group, at most 256) with a scale of their own, so that a row's result does not depend
            on its neighbours. `None` leaves it in float.
        scale_bits: 16 rounds scales to half precision before any code is chosen, which costs next to nothing and
            takes 2 bytes for each group in files; 32 keeps them in float32.

    Raises:
        UnsupportedOptionError: A value is impossible.

    Example:
        >>> Quantize(bits=4, group_size=64, overrides={"*.down_proj": {"bits": 8}}).form("x.down_proj", "linear")
        Form(bits=8, group_size=64, symmetric=True, activations=None, scale_bits=16, offset=False)
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
    activations: int | None = None
    scale_bits: int = 16

    def __post_init__(self) -> None:
        """Check every field."""
        for bits in (self.bits, self.embedding, self.head):
            if bits is not None:
                check_form(bits, self.group_size)
        check_fields(self.overrides, _OVERRIDABLE)
        _check_activations(self.activations)
        if type(self.scale_bits) is not int or self.scale_bits not in (16, 32):
            raise UnsupportedOptionError(f"scale_bits is {self.scale_bits!r}; expected 16 or 32")
        for changes in self.overrides.values():
            if changes is not None:
                _check_activations(changes.get("activations"))
                check_form(changes.get("bits", self.bits), changes.get("group_size", self.group_size))

    def form(self, path: str, part: Part) -> Form | None:
        """Say how the weight of the module at `path` is quantized, `None` for not at all."""
        bits = {"linear": self.bits, "embedding": self.embedding, "head": self.head}[part]
        base = Form(self.bits, self.group_size, self.symmetric, self.activations, self.scale_bits)
        form = None if bits is None else replace(base, bits=bits)
        for changes in matching(self.overrides, path):
            form = None if changes is None else replace(form or base, **changes)
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
        return quantize(
            weight, form.bits, form.group_size, symmetric=form.symmetric, half=form.half, what=name
        )

    def draft(self) -> "Quantize":
        """Give a quicker step whose errors tell much the same of how this one's depend on the width."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe."""
        return plain_fields(self)


def _check_activations(bits: object) -> None:
    if bits is not None and (type(bits) is not int or bits != 8):
        raise UnsupportedOptionError(f"activations is {bits!r}; expected 8 bits, or None for float")
