"""The tokens that a row has seen so far."""

from dataclasses import dataclass

import numpy as np

from lmopt.types import IntArray


@dataclass(slots=True)
class History:
    """Prompt and new tokens of one row, in a buffer with room for all that may come.

    Attributes:
        buffer: `(max_length,)` int64; the first `length` entries are valid.
        length: Tokens so far, prompt included.
        prompt_length: Tokens of the prompt.
    """

    buffer: IntArray
    length: int
    prompt_length: int

    @classmethod
    def start(cls, prompt: IntArray, new_tokens: int) -> "History":
        """Copy a prompt into a buffer with room for `new_tokens` more."""
        buffer = np.zeros(prompt.size + new_tokens, np.int64)
        buffer[: prompt.size] = prompt
        return cls(buffer, prompt.size, prompt.size)

    @property
    def max_length(self) -> int:
        """Most tokens the row may ever hold, prompt included."""
        return self.buffer.size

    @property
    def seen(self) -> IntArray:
        """`(length,)` prompt and new tokens; a view."""
        return self.buffer[: self.length]

    @property
    def new(self) -> IntArray:
        """`(length - prompt_length,)` new tokens; a view."""
        return self.buffer[self.prompt_length : self.length]

    @property
    def newest(self) -> int:
        """The last token."""
        return int(self.buffer[self.length - 1])

    def append(self, token: int) -> None:
        """Add one token."""
        self.buffer[self.length] = token
        self.length += 1
