"""Which names of a foreign library our source uses, read off the source itself."""

import ast
from collections.abc import Iterable
from pathlib import Path


def used(files: Iterable[Path], holders: Iterable[str]) -> set[str]:
    """List the attributes that are taken of some expressions.

    Args:
        files: Python files.
        holders: Expressions as `ast.unparse` writes them: `"runtime"`, `"self._native"`.
    """
    wanted = set(holders)
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in wanted:
                found.add(node.attr)
    return found


def missing(names: Iterable[str], owner: object) -> list[str]:
    """List the names that a live class or module lacks."""
    return sorted(name for name in names if not hasattr(owner, name))
