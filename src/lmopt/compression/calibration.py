"""Which texts a model reads while it is compressed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmopt.errors import InputError, UnsupportedOptionError
from lmopt.tokenizer import Tokenizer
from lmopt.types import IntArray

LEAST_TOKENS: Final = 256
"""Fewer tokens than this say nothing about a layer of some hundred inputs."""

# Texts of fewer different tokens are a file of blanks, or one word.
_LEAST_KINDS: Final = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """Texts, and how much of them is read; equal for equal values, on every machine.

    Attributes:
        texts: Texts. `None` lets the model write them itself, which takes as long as that takes.
        rows: Stretches of text, at least 1. Where the texts are shorter, as many as they have.
        row_tokens: Tokens of a stretch, at least 16, cut down to the model's context.
        seed: Chooses the stretches, and what a model writes.
        sources: For an encoder-decoder: what its encoder reads (texts, ids or features); each of `texts` is then what
            is right after one of them, and without `texts` the model's own greedy texts are. All of them are read.

    Raises:
        UnsupportedOptionError: A number is out of its range, or there are not as many texts as sources.
    """

    texts: Sequence[str] | None
    rows: int = 128
    row_tokens: int = 512
    seed: int = 0
    sources: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if isinstance(self.texts, str):
            raise UnsupportedOptionError(
                "texts is a single string; give a list of texts, or a Path of a file"
            )
        if isinstance(self.sources, str):
            raise UnsupportedOptionError("sources is a single string; give a list of sources")
        if self.sources is not None and self.texts is not None and len(self.sources) != len(self.texts):
            raise UnsupportedOptionError(
                f"there are {len(self.sources)} sources and {len(self.texts)} texts; give one text for each "
                "source, or texts=None"
            )
        if type(self.rows) is not int or self.rows < 1:
            raise UnsupportedOptionError(f"rows is {self.rows!r}; expected a whole number of at least 1")
        if type(self.row_tokens) is not int or self.row_tokens < 16:
            raise UnsupportedOptionError(f"row_tokens is {self.row_tokens!r}; expected at least 16")

    @classmethod
    def of(cls, given: "Calibration | Sequence[str] | str | os.PathLike[str]") -> "Calibration":
        """Take texts, or the path of a file with one, for a calibration with usual sizes.

        Raises:
            InputError: The file cannot be read as UTF-8.
        """
        if isinstance(given, Calibration):
            return given
        if not isinstance(given, str | os.PathLike):
            return cls(tuple(given))
        try:
            return cls((Path(given).read_text(encoding="utf-8"),))
        except (OSError, ValueError) as error:
            raise InputError(
                f"calibration {os.fspath(given)!r} is no text file ({error}); give a path, or a list of texts"
            ) from None

    def cut(self, tokenizer: Tokenizer, context_length: int | None) -> list[IntArray]:
        """Encode the texts and choose stretches of equal length.

        Args:
            tokenizer: The model's.
            context_length: Most tokens the model reads.

        Returns:
            `(row_tokens,)` int64 ids each.

        Raises:
            InputError: The texts are too short, or hold hardly any different tokens.
        """
        width = min(self.row_tokens, context_length or self.row_tokens)
        ids = np.array([token for text in self.texts or () for token in tokenizer.encode(text)], np.int64)
        if len(ids) < max(LEAST_TOKENS, width):
            raise InputError(
                f"the calibration texts hold {len(ids)} tokens; at least {max(LEAST_TOKENS, width)} are needed, and "
                f"{self.rows * width:,} are wanted ({self.rows} rows of {width})"
            )
        if (kinds := len(np.unique(ids))) < _LEAST_KINDS:
            raise InputError(
                f"the calibration texts hold {kinds} different tokens; give text as the model will meet it"
            )
        return choose_rows(ids, self.rows, width, self.seed)


def choose_rows(ids: IntArray, rows: int, width: int, seed: int) -> list[IntArray]:
    """Cut ids into stretches that do not overlap, and choose some at random, kept in order."""
    places = np.arange(len(ids) // width)
    if len(places) > rows:
        places = np.sort(np.random.default_rng(seed).choice(places, rows, replace=False))
    return [ids[place * width : (place + 1) * width] for place in places.tolist()]
