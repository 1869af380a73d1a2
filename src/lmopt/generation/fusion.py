"""Shallow fusion: a language model has a say in each token that another model writes.

The score of a token is `log p(token | source, text) + weight * log p_lm(token | text)` (Gulcehre and others,
arXiv:1503.03535), summed over a beam. Both models must have one vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmopt.contracts import Engine
from lmopt.errors import ContextLengthError, UnsupportedOptionError, VocabularyMismatchError
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.generation.sampling import log_probabilities
from lmopt.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Fusion:
    """A language model, and how much its word counts.

    Attributes:
        engine: Its engine.
        weight: Factor of its log-probabilities, at least 0; 0.1 to 0.5 is usual.
        start_token_id: What it reads before the first new token; it sees no tokens of a prompt.

    Raises:
        UnsupportedOptionError: The weight is no number of at least 0.
    """

    engine: Engine
    weight: float
    start_token_id: int

    def __post_init__(self) -> None:
        """Check the weight."""
        if not (isinstance(self.weight, int | float) and 0 <= self.weight < float("inf")):
            raise UnsupportedOptionError(f"weight is {self.weight!r}; expected a number of at least 0")

    def check(self, vocab_size: int, new_tokens: int) -> None:
        """Hold it against what is to be written.

        Raises:
            VocabularyMismatchError: The vocabularies differ in size.
            ContextLengthError: It cannot read so many tokens.
        """
        facts = self.engine.facts
        if facts.vocab_size != vocab_size:
            raise VocabularyMismatchError(
                f"the language model has {facts.vocab_size} tokens, the model {vocab_size}: fusion adds their "
                "log-probabilities token by token. Let it choose among whole texts instead: method='rescore'"
            )
        if facts.context_length is not None and new_tokens > facts.context_length:
            raise ContextLengthError(
                f"{new_tokens} new tokens were allowed; the language model reads {facts.context_length}. "
                f"Pass max_new_tokens={facts.context_length}"
            )


class Companion:
    """The language model's rows beside those of a search, all of one length.

    Args:
        fusion: The language model.
        rows: Rows of the search.
        capacity: Most tokens that a row will hold.
    """

    def __init__(self, fusion: Fusion, rows: int, capacity: int) -> None:
        self._weight = np.float32(fusion.weight)
        self._engine = for_unequal_rows(fusion.engine)
        self._state = self._engine.begin(rows, capacity=capacity)
        self._read(np.full((rows, 1), fusion.start_token_id, np.int64))

    def follow(self, parents: IntArray, tokens: IntArray) -> None:
        """Go on as the search does.

        Args:
            parents: `(rows,)` row that each new row continues.
            tokens: `(rows, 1)` token that it continues with.
        """
        self._state = self._engine.select(self._state, parents)
        self._read(tokens)

    def add(self, scores: FloatArray, rows: Sequence[int] | slice) -> FloatArray:
        """Add its weighted log-probabilities to `(rows, vocab_size)` scores."""
        fused: FloatArray = scores + self._weight * self._logprobs[rows]
        return fused

    def _read(self, tokens: IntArray) -> None:
        lengths = np.ones(len(tokens), np.int64)
        logits, self._state = self._engine.forward(tokens, lengths, self._state, last_only=True)
        self._logprobs = log_probabilities(logits[:, -1])
