"""Quantize weights by rounding each to the nearest code (RTN)."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from lmopt.compression.layout import QuantizedArray, check_form, quantize
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray

Part = Literal["linear", "embedding", "head"]
"""What a weight is for: a linear inside, the look-up of tokens, or the linear that makes logits."""

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


@dataclass(frozen=True, slots=True)
class Quantize:
    """Weights as `bits`-bit codes in groups that share a scale; activations stay as they are.

    Attributes:
        bits: Width of a code, 2 to 8.
        group_size: Columns (inputs) that share a scale. A last group that is not full is padded.
        symmetric: Whether zero is the middle code; otherwise each group has a whole zero point.
        method: `"rtn"`, round to nearest: no calibration, the loss is what it is.
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

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    method: Literal["rtn"] = "rtn"
    embedding: int | None = 8
    head: int | None = 8
    overrides: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        if self.method != "rtn":
            raise UnsupportedOptionError(f"method is {self.method!r}; lmopt has: rtn")
        for bits in (self.bits, self.embedding, self.head):
            if bits is not None:
                check_form(bits, self.group_size)
        for pattern, changes in self.overrides.items():
            if changes is None:
                continue
            if unknown := sorted(changes.keys() - _OVERRIDABLE):
                raise UnsupportedOptionError(
                    f"the override of {pattern!r} has {unknown[0]!r}; it may have {', '.join(sorted(_OVERRIDABLE))}, "
                    "or be None to leave the weight in float"
                )
            check_form(changes.get("bits", self.bits), changes.get("group_size", self.group_size))

    def form(self, path: str, part: Part) -> Form | None:
        """Say how the weight of the module at `path` is quantized, `None` for not at all."""
        bits = {"linear": self.bits, "embedding": self.embedding, "head": self.head}[part]
        form = None if bits is None else Form(bits, self.group_size, self.symmetric)
        for pattern, changes in self.overrides.items():
            if fnmatch.fnmatchcase(path, pattern):
                base = form or Form(self.bits, self.group_size, self.symmetric)
                form = None if changes is None else Form(**{**asdict(base), **changes})
        return form

    def check_names(self, paths: Iterable[str]) -> None:
        """Refuse overrides that match no weight.

        Raises:
            UnsupportedOptionError: With near matches.
        """
        known = list(paths)
        for pattern in self.overrides:
            if not fnmatch.filter(known, pattern):
                near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
                raise UnsupportedOptionError(
                    f"the override {pattern!r} matches none of the {len(known)} weights; near: {', '.join(near)}"
                )

    def apply(self, weight: FloatArray, form: Form, name: str) -> QuantizedArray:
        """Quantize one weight.

        Args:
            weight: `(rows, columns)` float32.
            form: From `form`.
            name: Name of the weight, for messages.

        Raises:
            InputError: It holds NaN or infinity.
        """
        return quantize(weight, form.bits, form.group_size, symmetric=form.symmetric, what=name)

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe."""
        overrides = {k: None if v is None else dict(v) for k, v in self.overrides.items()}
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"step": "quantize", **fields, "overrides": overrides}
