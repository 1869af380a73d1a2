"""The fenced blocks of a Markdown page, and what is said about running them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARKER = re.compile(r"<!-- not run: (.{10,}?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Path of the page.
        line: Line of its first word, from 1.
        language: The word behind the fence.
        text: What stands inside.
        not_run: The page's reason not to run it, or `""`.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str


def blocks(page: Path) -> Iterator[Block]:
    """Find the blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", text, re.MULTILINE | re.DOTALL):
        language, _, rest = found[2].strip().partition(" ")
        # In the line before, or behind the language: "python notest (it needs a GPU)".
        marker = MARKER.search(text[: found.start()]) or re.fullmatch(r"notest \((.{10,})\)", rest)
        line = text.count("\n", 0, found.start(3)) + 1
        yield Block(page, line, language, found[3], marker[1] if marker else "")


def commands(block: Block) -> list[list[str]]:
    """Take a block of shell commands apart into words; lines that end in a backslash go on."""
    joined = block.text.replace("\\\n", " ")
    parts = (part for line in joined.splitlines() for part in line.split(" && "))
    return [words for part in parts if (words := shlex.split(part, comments=True))]
