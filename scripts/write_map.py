"""Write docs/reference/map.md, one line a module, from the first lines of the modules' docstrings.

    python scripts/write_map.py

A test fails when the page is out of date.
"""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PAGE = ROOT / "docs" / "reference" / "map.md"
HEAD = """\
# Map of the source

Every module in one line, from the top floor down. A module may import what stands below it, never what
stands above; `lint-imports` proves it. Written by `python scripts/write_map.py` from the modules' own first
lines.
"""


def floors() -> list[str]:
    """Rooms and modules of `lmopt` from the top down, as import-linter is told."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(one["layers"] for one in contracts["contracts"] if one["type"] == "layers")
    return [name.strip() for layer in layers for name in layer.split("|")]


def module_name(path: Path) -> str:
    """Import name of a file."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def first_line(path: Path) -> str:
    """First line of a module's docstring, with a bar escaped for the table."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("|", r"\|")


def render() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for floor in floors():
        folder = SOURCE / "lmopt" / floor
        paths = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        rows = [
            f"| `{module_name(path)}` | {first_line(path)} |"
            for path in paths
            if path.is_file() and first_line(path)
        ]
        if rows:
            parts.append(f"## {floor}\n\n| module | what it is for |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
