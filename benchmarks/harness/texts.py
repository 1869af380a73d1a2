"""Prompts: pieces of real text, new ones each round, so that nothing that is remembered helps anybody."""

from collections.abc import Sequence
from dataclasses import dataclass

from lmopt.errors import InputError

UNEQUAL = (1.0, 0.125, 0.76, 0.31, 0.5, 0.87, 0.23, 0.625)
"""Lengths of the prompts of a batch, as shares of the longest, again from the start after the eighth."""


@dataclass(frozen=True)
class Workload:
    """What a lap does.

    Attributes:
        name: In the tables.
        prompt_tokens: Of a single prompt, and of the longest of a batch.
        new_tokens: To generate.
        batch: Rows.
        judged_by: Figure by which a peer's best setting is chosen: `"decode"` or `"prefill"`.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    batch: int = 1
    judged_by: str = "decode"

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        if self.batch == 1:
            return [self.prompt_tokens]
        return [max(1, int(self.prompt_tokens * UNEQUAL[row % len(UNEQUAL)])) for row in range(self.batch)]

    def prompts(self, ids: Sequence[int], number: int) -> list[list[int]]:
        """Cut the prompts of a round from a text.

        Args:
            ids: The text.
            number: Of the round; each begins where the one before ended.

        Raises:
            InputError: The text is too short.
        """
        place = number * sum(self.lengths)
        found = []
        for length in self.lengths:
            found.append(list(ids[place : place + length]))
            place += length
        if len(found[-1]) < self.lengths[-1]:
            raise InputError(
                f"round {number} of {self.name} ends at token {place} of the text, which has {len(ids)}; "
                "give a longer --text or fewer --rounds"
            )
        return found
