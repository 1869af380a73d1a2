"""One row of a request: what it has read, how it is sampled, when it ends, what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lmopt.contracts import Engine
from lmopt.errors import (
    DtypeError,
    EmptyPromptError,
    ShapeError,
    TokenIdError,
    TokenizerError,
    UnsupportedOptionError,
)
from lmopt.generation.config import GenerationConfig
from lmopt.generation.history import History
from lmopt.generation.randomness import fresh_seed, uniform
from lmopt.generation.results import FinishReason, Generation, Token
from lmopt.generation.sampling import largest, log_normalizer
from lmopt.generation.stopping import Detokenizer, StopStrings
from lmopt.types import FloatArray, IntArray


class Cancel(Protocol):
    """Says whether to stop; a `threading.Event` does."""

    def is_set(self) -> bool:
        """Whether the work is to end."""
        ...


@dataclass(slots=True)
class Row:
    """One sequence while it grows.

    Attributes:
        prompt: Number of the prompt in the request.
        sequence: Number of the sequence among those of its prompt.
        history: Its tokens.
        eos: Ids that end it.
        stops: Looks for stop strings, `None` where there are none.
        seed: Seed of its random numbers, `None` where nothing is drawn.
        logprobs: As in `Generation`.
        top_logprobs: As in `Generation`.
        finish_reason: `None` while it grows.
    """

    prompt: int
    sequence: int
    history: History
    eos: frozenset[int] = frozenset()
    stops: StopStrings | None = None
    seed: int | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def uniform(self) -> float:
        """Random number of the next position."""
        return uniform(self.seed or 0, self.sequence, self.history.length)

    def accept(self, token: int) -> None:
        """Add a token and find out whether the row ends with it."""
        history = self.history
        history.append(token)
        if token in self.eos:
            self.finish_reason = "stop"
        elif self.stops is not None and self.stops.matches(history.seen):
            self.finish_reason = "stop_string"
        elif history.length == history.max_length:
            self.finish_reason = "length"

    def record(self, logits: FloatArray, token: int, top: int) -> None:
        """Note the log-probability of a token, and of the `top` likeliest, under `(vocab_size,)` logits."""
        normalizer = log_normalizer(logits)
        self.logprobs.append(float(logits[token]) - normalizer)
        if top:
            ids = largest(logits, top).tolist()
            self.top_logprobs.append({one: float(logits[one]) - normalizer for one in ids})

    def token(self) -> Token:
        """Describe the newest token."""
        return Token(self.prompt, self.sequence, int(self.history.new[-1]), self.finish_reason)

    def text(self, tokenizer: Detokenizer) -> str:
        """Text of the new tokens, cut before a stop string."""
        text = tokenizer.decode(self.history.new.tolist(), skip_special_tokens=True)
        if self.stops is None or self.finish_reason != "stop_string":
            return text
        return text[: max(0, len(text) - self.stops.tail(self.history.seen))]

    def result(self, config: GenerationConfig, text: str | None) -> Generation:
        """Make the result, with the text that the caller has."""
        return Generation(
            token_ids=self.history.new.tolist(),
            text=text,
            finish_reason=self.finish_reason or "cancelled",
            prompt_tokens=self.history.prompt_length,
            logprobs=self.logprobs if config.wants_logprobs else None,
            top_logprobs=self.top_logprobs if config.top_logprobs else None,
            seed=self.seed,
        )


def prepare(
    engine: Engine,
    prompts: Sequence[Sequence[int] | IntArray],
    config: GenerationConfig,
    tokenizer: Detokenizer | None,
) -> list[Row]:
    """Check the prompts and make the rows, `num_return_sequences` a prompt.

    With beams there is one row a prompt.

    Raises:
        InputError: A prompt is malformed, empty or too long; the number of it is in the message.
        TokenizerError: Stop strings are asked for and no tokenizer is given.
        UnsupportedOptionError: The number of seeds is not that of prompts.
    """
    stops = None
    if config.stops:
        if tokenizer is None:
            raise TokenizerError(
                f"stop_strings={list(config.stops)} need a tokenizer. Pass tokenizer=... too."
            )
        stops = StopStrings(config.stops, tokenizer)
    if isinstance(config.seed, tuple) and len(config.seed) != len(prompts):
        raise UnsupportedOptionError(
            f"{len(config.seed)} seeds were given for {len(prompts)} prompts. Give one a prompt, or just one."
        )
    rows = []
    for number, prompt in enumerate(prompts):
        ids = check_ids(prompt, engine.facts.vocab_size, f"prompt {number}")
        if ids.size == 0:
            ids = _empty_prompt(config, engine.facts.vocab_size, number)
        new_tokens = config.new_tokens(ids.size, engine.facts.context_length)
        seed = config.seed_of(number) if config.do_sample else None
        if config.do_sample and seed is None:
            seed = fresh_seed()
        copies = config.num_return_sequences if config.num_beams == 1 else 1
        rows += [
            Row(number, copy, History.start(ids, new_tokens), frozenset(config.eos_ids), stops, seed)
            for copy in range(copies)
        ]
    return rows


def check_ids(ids: Sequence[int] | IntArray, vocab_size: int, what: str) -> IntArray:
    """Turn token ids into `(n,)` int64.

    Raises:
        DtypeError: They are not integers.
        ShapeError: They are not a flat list.
        TokenIdError: One is outside the vocabulary.
    """
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise ShapeError(f"{what} is not a flat list of token ids ({error}).") from error
    if array.dtype.kind == "U":
        raise DtypeError(f"{what} is a text; expected token ids. Encode it with the model's tokenizer first.")
    if array.ndim != 1:
        raise ShapeError(f"{what} has shape {array.shape}; expected a flat list of token ids.")
    if array.size and array.dtype.kind not in "iu":
        raise DtypeError(f"{what} holds {array.dtype}; expected integer token ids.")
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        wrong = int(array[(array < 0) | (array >= vocab_size)][0])
        raise TokenIdError(
            f"{what} holds id {wrong}; the model's vocabulary has ids 0 to {vocab_size - 1}. "
            f"Was it encoded with another model's tokenizer?"
        )
    return array.astype(np.int64)


def _empty_prompt(config: GenerationConfig, vocab_size: int, number: int) -> IntArray:
    if config.bos_token_id is None:
        raise EmptyPromptError(
            f"prompt {number} is empty, and the model has no beginning-of-sequence id to start from. "
            f"Give at least one token, or pass bos_token_id."
        )
    return check_ids([config.bos_token_id], vocab_size, "bos_token_id")
