"""What generation returns."""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lmopt.errors import LmoptError

FinishReason: TypeAlias = Literal["stop", "stop_string", "length", "cancelled", "time", "error"]
"""Why a sequence ended: an end-of-sequence id, a stop string, its length limit, the caller, `max_time`,
or an error of this sequence alone (`Generation.error`)."""


@dataclass(frozen=True, slots=True)
class Token:
    """One new token, as `on_token` callbacks receive it.

    Attributes:
        prompt: Number of the prompt in the request.
        sequence: Number of the sequence among those of its prompt (`num_return_sequences`).
        token_id: The token.
        finish_reason: Why the sequence ends with this token, `None` where it goes on.
    """

    prompt: int
    sequence: int
    token_id: int
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated sequence.

    Attributes:
        token_ids: New tokens only, the end-of-sequence id and the tokens of a stop string included:
            the ids that transformers' `generate` returns after the prompt.
        text: The new tokens as text, without special tokens; it ends before a stop string. `None`
            where no tokenizer was given.
        finish_reason: Why the sequence ended.
        prompt_tokens: Tokens that the model read before the first new one.
        logprobs: Natural-log probability of each new token under the model itself (log-softmax of
            the raw logits, before penalties and temperature), `None` unless asked for.
        top_logprobs: At each new token, the most likely ids and their log-probabilities, best
            first; `None` unless a number of them was asked for.
        score: With beams, the sum of log-probabilities over length to the power of
            `length_penalty` (transformers' `sequences_scores`); else `None`.
        seed: Seed that the sequence was sampled with, drawn by lmopt where none was given; `None`
            where nothing was sampled.
        error: What ended the sequence where `finish_reason` is `"error"`; tokens and text are those
            before it.
        drafted: Tokens that prompt lookup proposed. How the work was done, not what came out, so it
            does not count when generations are compared.
        accepted: How many of them were right.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    score: float | None = None
    seed: int | None = None
    error: LmoptError | None = None
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)

    def __str__(self) -> str:
        """Give the text, or the ids where there is no tokenizer."""
        return " ".join(map(str, self.token_ids)) if self.text is None else self.text
