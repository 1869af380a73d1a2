"""Exceptions by module path, as quantizers and pruners take them."""

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

from lmopt.errors import UnsupportedOptionError

Part = Literal["linear", "embedding", "head"]
"""What a weight is for: a linear inside, the look-up of tokens, or the linear that makes logits."""

Overrides: TypeAlias = Mapping[str, Mapping[str, Any] | None]
"""Module path, or pattern with `*`, to the fields that differ there, or `None` to leave the weight as it is."""


def check_fields(overrides: Overrides, known: frozenset[str]) -> None:
    """Refuse overrides of fields that cannot be overridden.

    Raises:
        UnsupportedOptionError: The message says which can.
    """
    for pattern, changes in overrides.items():
        if changes is not None and (unknown := sorted(changes.keys() - known)):
            raise UnsupportedOptionError(
                f"the override of {pattern!r} has {unknown[0]!r}; it may have {', '.join(sorted(known))}, or be "
                "None to leave the weight as it is"
            )


def check_names(overrides: Overrides, paths: Iterable[str]) -> None:
    """Refuse overrides that match no weight.

    Raises:
        UnsupportedOptionError: With near matches.
    """
    known = list(paths)
    for pattern in overrides:
        if not fnmatch.filter(known, pattern):
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:3]
            raise UnsupportedOptionError(
                f"the override {pattern!r} matches none of the {len(known)} weights; near: {', '.join(near)}"
            )


def matching(overrides: Overrides, path: str) -> Iterator[Mapping[str, Any] | None]:
    """Give the overrides that hold for a path, in their order."""
    for pattern, changes in overrides.items():
        if fnmatch.fnmatchcase(path, pattern):
            yield changes
