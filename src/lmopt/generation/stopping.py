"""Stop strings across token borders.

A sequence ends with the token that completes a stop string, wherever the string begins: inside a
token, in an earlier one, or in the prompt. Those are transformers' rules (`StopStringCriteria`). What
is searched is the text of the last few tokens, special tokens included, so the cost of a token does
not grow with the text.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from lmopt.types import IntArray

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are not, or not yet, UTF-8."""

_CONTEXT: Final = 4  # tokens before the window, because decoders treat the first token specially


class Detokenizer(Protocol):
    """The part of `lmopt.tokenizer.Tokenizer` that generation needs."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Turn ids into text."""
        ...

    def id_to_token(self, id: int) -> str | None:
        """Give the vocabulary entry of an id."""
        ...


class StopStrings:
    """Looks for stop strings at the end of a row.

    Args:
        strings: The stop strings, at least one.
        tokenizer: Turns ids into text.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Detokenizer) -> None:
        self._strings = tuple(strings)
        self._tokenizer = tokenizer
        # Every token has at least one byte of text.
        self._window = max(len(text.encode()) for text in strings) + _CONTEXT

    def matches(self, seen: IntArray) -> bool:
        """Say whether the last of the `(length,)` ids completes a stop string."""
        window = seen[-self._window :].tolist()
        text = self._decode(window)
        # Almost always none is there at all, and one decoding is enough to know.
        return any(string in text for string in self._strings) and self._match(window, text) is not None

    def tail(self, seen: IntArray) -> int:
        """Count the characters at the end of the row's text that belong to a stop string.

        Args:
            seen: `(length,)` ids.

        Returns:
            Characters of the text without special tokens, from the start of a stop string that the
            last token completes, or else of one that it may have begun, to the end; 0 for neither.
        """
        window = seen[-self._window :].tolist()
        text = self._decode(window)
        start = self._match(window, text)
        if start is None:
            start = self._begun(text)
        if start == len(text):
            return 0
        # Find the token in which it starts; all in terms of the text that the user sees.
        before = len(window) - 1
        while before and len(self._decode(window[:before])) > start:
            before -= 1
        kept = start - len(self._decode(window[:before]))
        visible = len(self._decode(window, special=False)) - len(self._decode(window[:before], special=False))
        return max(0, visible - kept)

    def _match(self, window: list[int], text: str) -> int | None:
        """Start of the earliest stop string that the last token completes."""
        # The character that an earlier token left incomplete is completed by the last one.
        old = len(self._decode(window[:-1]).rstrip(REPLACEMENT))
        starts = [text.find(string, max(0, old - len(string) + 1)) for string in self._strings]
        return min((start for start in starts if start >= 0), default=None)

    def _begun(self, text: str) -> int:
        """Start of the longest end of `text` that begins a stop string; its length where there is none."""
        # An incomplete character at the end may become the next one of the string.
        whole = text.rstrip(REPLACEMENT)
        longest = 0
        for string in self._strings:
            for size in range(min(len(string) - 1, len(whole)), longest, -1):
                if whole.endswith(string[:size]):
                    longest = size
                    break
        return len(whole) - longest if longest else len(text)

    def _decode(self, ids: list[int], special: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=not special)
