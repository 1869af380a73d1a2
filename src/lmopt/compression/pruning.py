"""What the methods have in common that set single weights to zero."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from lmopt.compression.overrides import Overrides, Part, check_fields, check_names, matching
from lmopt.compression.step import plain_fields
from lmopt.errors import InputError, UnsupportedOptionError
from lmopt.types import FloatArray

_OVERRIDABLE: Final = frozenset({"sparsity", "pattern"})


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How many weights of a linear become zero.

    Attributes:
        sparsity: Share of zeros, 0 up to but not 1.
        pattern: `"N:M"`, at most `N` of `M` neighbouring inputs are not zero; `None` for any places.

    Raises:
        UnsupportedOptionError: A value is impossible, or one contradicts the other.
    """

    sparsity: float
    pattern: str | None = None

    def __post_init__(self) -> None:
        """Check both."""
        share = self.sparsity
        if not isinstance(share, float | int) or isinstance(share, bool) or not 0 <= share < 1:
            raise UnsupportedOptionError(f"sparsity is {share!r}; expected a share of zeros from 0, below 1")
        if self.pattern is None:
            return
        told = share_of(self.pattern)
        if abs(share - told) > 1e-6:
            raise UnsupportedOptionError(
                f"the pattern {self.pattern} makes a sparsity of {told:g}, and sparsity is {share:g}; give "
                f"sparsity={told:g}"
            )

    def window(self) -> tuple[int, int]:
        """Give `N` and `M` of the pattern."""
        kept, _, of = (self.pattern or "").partition(":")
        return int(kept), int(of)


def share_of(pattern: object) -> float:
    """Give the sparsity that an `"N:M"` pattern makes.

    Raises:
        UnsupportedOptionError: It is no such pattern.
    """
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern) if isinstance(pattern, str) else None
    if found is None or int(found[1]) >= int(found[2]):
        raise UnsupportedOptionError(
            f"pattern is {pattern!r}; expected 'N:M' with N below M, such as '2:4', for at most N weights in M "
            "that are not zero"
        )
    return 1 - int(found[1]) / int(found[2])


@dataclass(frozen=True, slots=True)
class Prune:
    """Weights of linears set to zero one by one; the base of `Magnitude`, `Wanda` and `SparseGPT`.

    The embedding and the head stay whole unless an override names them, as in the papers. What is left is a
    dense matrix with zeros: smaller when it is packed, faster only where a kernel knows the pattern.

    Attributes:
        sparsity: Share of zeros, 0 up to but not 1.
        pattern: `"N:M"`, at most `N` of `M` neighbouring inputs are not zero (`"2:4"`, `"4:8"`), or `None`
            for zeros wherever they cost least. Must agree with `sparsity`.
        overrides: Module path, or pattern with `*`, to what differs there: `sparsity`, `pattern`, or `None`
            to leave the weight as it is. One of the two settles the other. The last one that matches counts.

    Raises:
        UnsupportedOptionError: A value is impossible.
    """

    target: ClassVar[str] = "lmopt.backends.torch.compressing:by_matrix"

    sparsity: float = 0.5
    pattern: str | None = None
    overrides: Overrides = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        whole = Sparsity(self.sparsity, self.pattern)
        check_fields(self.overrides, _OVERRIDABLE)
        for changes in self.overrides.values():
            if changes is not None:
                _changed(whole, changes)

    def form(self, path: str, part: Part) -> Sparsity | None:
        """Say how sparse the weight of the module at `path` becomes, `None` for not at all."""
        whole = Sparsity(self.sparsity, self.pattern)
        form = whole if part == "linear" else None
        for changes in matching(self.overrides, path):
            form = None if changes is None else _changed(form or whole, changes)
        return form

    def check_names(self, paths: Iterable[str]) -> None:
        """Refuse overrides that match no weight.

        Raises:
            UnsupportedOptionError: With near matches.
        """
        check_names(self.overrides, paths)

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe."""
        return plain_fields(self)


def _changed(form: Sparsity, changes: Mapping[str, Any]) -> Sparsity:
    """Change one of sparsity and pattern, or both; the one that is not told follows."""
    told = dict(changes)
    if "sparsity" in told:
        told.setdefault("pattern", None)
    elif told.get("pattern") is not None:
        told["sparsity"] = share_of(told["pattern"])
    return replace(form, **told)


def least(scores: FloatArray, count: int) -> NDArray[np.bool_]:
    """Mark the `count` smallest scores of each row; of equal ones, the first.

    Args:
        scores: `(rows, columns)`.
        count: How many to mark.

    Returns:
        `(rows, columns)`, `count` true in each row.
    """
    mask = np.zeros(scores.shape, np.bool_)
    if count:
        # A stable sort, for equal scores (a ReLU's zeros) are common and the result must be one and the same.
        np.put_along_axis(mask, np.argsort(scores, axis=-1, kind="stable")[:, :count], True, axis=-1)
    return mask


def least_of_window(scores: FloatArray, form: Sparsity, name: str) -> NDArray[np.bool_]:
    """Mark the smallest `M - N` scores of each `M` neighbours in a row.

    Raises:
        InputError: The columns do not divide by `M`.
    """
    kept, of = form.window()
    check_window(scores.shape[1], form, name)
    return least(scores.reshape(-1, of), of - kept).reshape(scores.shape)


def check_window(columns: int, form: Sparsity, name: str) -> None:
    """Refuse a pattern that does not divide a weight's inputs.

    Raises:
        InputError: It does not.
    """
    if form.pattern is not None and columns % form.window()[1]:
        raise InputError(
            f"{name} has {columns} inputs, which the pattern {form.pattern} does not divide; leave it out with "
            f"overrides={{{name!r}: None}} or give it a sparsity of its own"
        )


def unread(name: str) -> InputError:
    """Make the error of a weight without statistics."""
    return InputError(
        f"{name} has read nothing of the calibration texts, so that none of its weights can be told from another; "
        f"give texts that reach it, or leave it out with overrides={{{name!r}: None}}"
    )
