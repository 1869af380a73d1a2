"""Prompt lookup: what followed the last tokens before may follow them again.

A draft is read together with the newest token in one call, which costs little more than a plain step as
long as the weights take longer to read than the tokens take to compute. The logits after each of its
tokens choose what they would have chosen anyway (the random number of a position does not depend on how it
was reached), so the tokens are those of plain decoding, and a draft is only as good as its first wrong
token. (Saxena, "Prompt lookup decoding", 2023; Leviathan et al., arXiv:2211.17192, without their random
acceptance.)
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from lmopt.generation.history import History
from lmopt.types import IntArray

if TYPE_CHECKING:
    from lmopt.generation.config import GenerationConfig
    from lmopt.generation.rows import Row

DEFAULT_NGRAM: Final = 3
"""Most tokens that are matched where `max_matching_ngram_size` is not given."""

_LENGTHS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32)
_FIRST_GUESS: Final = (0.0, 0.2, 0.4, 0.6)  # chance of a draft's token by the size of its match
_GUESS_COUNTS: Final = 2.0  # as much as so many observed tokens
_MEMORY: Final = 0.8  # what counts of older drafts when a new one is judged
_WORTH: Final = 1.05  # gain below which a draft is not worth its risk
_FIRST_PAUSE, _LONGEST_PAUSE = 32, 512


class Costs(Protocol):
    """What `lmopt.generation.costs.CallCosts` knows."""

    def ratio(self, rows: int, drafted: int) -> float:
        """Time of a call with `drafted` more tokens a row, over that of a plain one."""
        ...


class Lookup:
    """Finds drafts in what a row has seen, and remembers how good they were.

    Args:
        most: Most tokens of a draft.
        largest: Most tokens of a match.

    Attributes:
        drafted: Tokens proposed so far.
        accepted: How many of them were right.
    """

    def __init__(self, most: int, largest: int) -> None:
        self.most = most
        self.drafted = 0
        self.accepted = 0
        self._largest = largest
        self._right = [0.0] * len(_FIRST_GUESS)
        self._wrong = [0.0] * len(_FIRST_GUESS)

    @classmethod
    def of(cls, config: "GenerationConfig") -> "Lookup | None":
        """Make the one that a config asks for."""
        if config.prompt_lookup_num_tokens is None:
            return None
        return cls(config.prompt_lookup_num_tokens, config.max_matching_ngram_size or DEFAULT_NGRAM)

    def find(self, history: History) -> tuple[int, IntArray]:
        """Look for the last tokens of a row further up.

        Returns:
            Tokens that match, 0 for none, and `(n,)` what followed them, `n` at most `most` and what
            the row has room for.
        """
        seen = history.seen
        room = min(self.most, history.max_length - history.length - 1)
        if room < 1:
            return 0, seen[:0]
        # Position after each earlier occurrence of the last token; then of the last two, ...
        after = np.flatnonzero(seen[:-1] == seen[-1]) + 1
        size = 1
        while after.size and size < self._largest:
            longer = after[after > size]
            longer = longer[seen[longer - size - 1] == seen[-size - 1]]
            if not longer.size:
                break
            after, size = longer, size + 1
        if not after.size:
            return 0, seen[:0]
        # The latest one, of those that enough tokens follow.
        enough = after[after + room <= seen.size]
        start = int(enough[-1] if enough.size else after[0])
        return size, seen[start : start + room].copy()

    def chance(self, size: int) -> float:
        """Estimate the chance that a token of a draft is right, if those before it were."""
        kind = min(size, len(_FIRST_GUESS) - 1)
        right, wrong = self._right[kind], self._wrong[kind]
        return (right + _GUESS_COUNTS * _FIRST_GUESS[kind]) / (right + wrong + _GUESS_COUNTS)

    def judge(self, size: int, drafted: int, accepted: int) -> None:
        """Note how a draft did."""
        kind = min(size, len(_FIRST_GUESS) - 1)
        self._right[kind] = _MEMORY * self._right[kind] + accepted
        self._wrong[kind] = _MEMORY * self._wrong[kind] + (accepted < drafted)
        self.drafted += drafted
        self.accepted += accepted


class Drafting:
    """Decides in each step whether drafts pay, and how long they should be.

    Where they do not pay it pauses, tries a short one after a while, and waits twice as long
    if that fails.

    Args:
        costs: What calls cost.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._pause = _FIRST_PAUSE
        self._waited = 0
        self._sizes: list[int] = []
        self._trial = False

    def propose(self, rows: Sequence["Row"]) -> list[IntArray] | None:
        """Find a draft for each row, possibly of length 0; `None` for a plain step."""
        found = [row.lookup.find(row.history) if row.lookup else (0, _NOTHING) for row in rows]
        longest = max(draft.size for _, draft in found)
        if not longest:
            return None
        chances = [
            row.lookup.chance(size) if row.lookup else 0.0 for row, (size, _) in zip(rows, found, strict=True)
        ]
        length, best = 0, _WORTH
        for one in dict.fromkeys(min(one, longest) for one in _LENGTHS):
            tokens = sum(
                _expected(chance, min(one, draft.size))
                for chance, (_, draft) in zip(chances, found, strict=True)
            )
            gain = tokens / (len(rows) * self._costs.ratio(len(rows), one))
            if gain > best:
                length, best = one, gain
        self._trial = not length
        if self._trial:
            self._waited += 1
            if self._waited < self._pause:
                return None
            length = 2
        self._waited = 0
        self._sizes = [size for size, _ in found]
        return [draft[:length] for _, draft in found]

    def judge(self, rows: Sequence["Row"], drafts: Sequence[IntArray], accepted: Sequence[int]) -> None:
        """Learn from how many tokens of each draft were right."""
        for row, size, draft, count in zip(rows, self._sizes, drafts, accepted, strict=True):
            if row.lookup is not None and draft.size:
                row.lookup.judge(size, draft.size, count)
        if sum(accepted) == sum(draft.size for draft in drafts):
            self._pause = _FIRST_PAUSE
        elif self._trial:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)


_NOTHING: Final = np.zeros(0, np.int64)


def _expected(chance: float, length: int) -> float:
    """Tokens that a step with a draft is expected to give, the one that comes anyway included."""
    return length + 1.0 if chance >= 1.0 else (1.0 - chance ** (length + 1)) / (1.0 - chance)
