"""One row of a request: what it has read, how it is sampled, when it ends, what it returns."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmopt.contracts import Engine
from lmopt.errors import EmptyPromptError, LmoptError, TokenizerError, UnsupportedOptionError
from lmopt.generation.config import GenerationConfig
from lmopt.generation.history import History
from lmopt.generation.lookup import Lookup
from lmopt.generation.processors import Processor, build_processors
from lmopt.generation.prompts import check_ids
from lmopt.generation.randomness import fresh_seed, uniform
from lmopt.generation.results import FinishReason, Generation, Token
from lmopt.generation.sampling import largest, log_normalizer
from lmopt.generation.sources import check_source
from lmopt.generation.stopping import Detokenizer, StopStrings
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts


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
        config: Its options.
        processors: What changes its logits before a token is chosen.
        eos: Ids that end it.
        stops: Looks for stop strings, `None` where there are none.
        seed: Seed of its random numbers, `None` where nothing is drawn.
        lookup: Drafts from what it has seen, `None` where they are not asked for.
        deadline: When it must end, on the clock of `time.monotonic`.
        cancel: Ends it from outside, `None` where nothing of its own does.
        source: What its encoder reads; `None` for models without one.
        logprobs: As in `Generation`.
        top_logprobs: As in `Generation`.
        finish_reason: `None` while it grows.
        error: What ended it, if an error did.
    """

    prompt: int
    sequence: int
    history: History
    config: GenerationConfig
    processors: tuple[Processor, ...] = ()
    eos: frozenset[int] = frozenset()
    stops: StopStrings | None = None
    seed: int | None = None
    lookup: Lookup | None = None
    deadline: float | None = None
    cancel: Cancel | None = None
    source: AnyArray | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: LmoptError | None = None

    def uniform(self) -> float:
        """Random number of the next position."""
        return uniform(self.seed or 0, self.sequence, self.history.length)

    def accept(self, token: int) -> None:
        """Add a token and find out whether the row ends with it."""
        history = self.history
        history.append(token)
        if token in self.eos:
            self.finish_reason = "stop"
        elif self.stops is not None and self._stops():
            self.finish_reason = "stop_string"
        elif history.length == history.max_length and self.finish_reason is None:
            self.finish_reason = "length"

    def fail(self, error: LmoptError) -> None:
        """End the row with an error of its own."""
        self.finish_reason, self.error = "error", error

    def record(self, logits: FloatArray, token: int) -> None:
        """Note the log-probability of a token, and of the likeliest, under `(vocab_size,)` logits."""
        normalizer = log_normalizer(logits)
        self.logprobs.append(float(logits[token]) - normalizer)
        if self.config.top_logprobs:
            ids = largest(logits, self.config.top_logprobs).tolist()
            self.top_logprobs.append({one: float(logits[one]) - normalizer for one in ids})

    def token(self) -> Token:
        """Describe the newest token."""
        return Token(self.prompt, self.sequence, self.history.newest, self.finish_reason)

    def text(self, tokenizer: Detokenizer) -> str:
        """Text of the new tokens, cut before a stop string."""
        text = tokenizer.decode(self.history.new.tolist(), skip_special_tokens=True)
        if self.stops is None or self.finish_reason != "stop_string":
            return text
        return text[: max(0, len(text) - self.stops.tail(self.history.seen))]

    def result(self, text: str | None) -> Generation:
        """Make the result, with the text that the caller has."""
        return Generation(
            token_ids=self.history.new.tolist(),
            text=text,
            finish_reason=self.finish_reason or "cancelled",
            prompt_tokens=self.history.prompt_length,
            logprobs=self.logprobs if self.config.wants_logprobs else None,
            top_logprobs=self.top_logprobs if self.config.top_logprobs else None,
            seed=self.seed,
            error=self.error,
            drafted=self.lookup.drafted if self.lookup else 0,
            accepted=self.lookup.accepted if self.lookup else 0,
        )

    def _stops(self) -> bool:
        assert self.stops is not None
        try:
            return self.stops.matches(self.history.seen)
        except Exception as error:
            self.fail(decoding_failed(error))
            return False


def decoding_failed(error: Exception) -> LmoptError:
    """Say that a tokenizer could not turn ids into text, in its own words."""
    if isinstance(error, LmoptError):
        return error
    found = TokenizerError(f"the tokenizer failed on generated ids: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found


def prepare(
    engine: Engine,
    prompts: Sequence[Sequence[int] | IntArray],
    config: GenerationConfig | Sequence[GenerationConfig],
    tokenizer: Detokenizer | None,
    sources: Sequence[Any] | None = None,
) -> list[Row]:
    """Check the prompts and make the rows, `num_return_sequences` a prompt, next to each other.

    With beams there is one row a prompt.

    Raises:
        InputError: A prompt is malformed, empty or too long; the number of it is in the message.
        TokenIdError: An option names an id outside the vocabulary.
        TokenizerError: Stop strings are asked for and no tokenizer is given.
        UnsupportedOptionError: The number of seeds, configs or sources is not that of prompts.
        UnsupportedError: There are sources and the model has no encoder, or the other way round.
    """
    configs = [config] * len(prompts) if isinstance(config, GenerationConfig) else list(config)
    if len(configs) != len(prompts):
        raise UnsupportedOptionError(
            f"{len(configs)} configs were given for {len(prompts)} prompts. Give one a prompt, or just one."
        )
    given = [None] * len(prompts) if sources is None else list(sources)
    if len(given) != len(prompts):
        raise UnsupportedOptionError(
            f"{len(given)} sources were given for {len(prompts)} prompts. Give one a prompt."
        )
    facts, now = engine.facts, time.monotonic()
    vocab_size = facts.vocab_size
    # What does not change is shared by the rows of one config.
    parts = {id(one): (_stop_strings(one, tokenizer), build_processors(one, vocab_size)) for one in configs}
    rows = []
    for number, (prompt, one) in enumerate(zip(prompts, configs, strict=True)):
        if isinstance(one.seed, tuple) and len(one.seed) != len(prompts):
            raise UnsupportedOptionError(
                f"{len(one.seed)} seeds were given for {len(prompts)} prompts. Give one a prompt, or just one."
            )
        ids = check_ids(prompt, vocab_size, f"prompt {number}")
        if ids.size == 0:
            ids = _empty_prompt(one, facts, number)
        source = check_source(given[number], facts, f"source {number}")
        new_tokens = one.new_tokens(ids.size, facts.context_length)
        seed = one.seed_of(number) if one.do_sample else None
        if one.do_sample and seed is None:
            seed = fresh_seed()
        stops, processors = parts[id(one)]
        rows += [
            Row(
                prompt=number,
                sequence=copy,
                history=History.start(ids, new_tokens),
                config=one,
                processors=processors,
                eos=frozenset(one.eos_ids),
                stops=stops,
                seed=seed,
                lookup=Lookup.of(one),
                deadline=None if one.max_time is None else now + one.max_time,
                source=source,
            )
            for copy in range(one.num_return_sequences if one.num_beams == 1 else 1)
        ]
    return rows


def _stop_strings(config: GenerationConfig, tokenizer: Detokenizer | None) -> StopStrings | None:
    if not config.stops:
        return None
    if tokenizer is None:
        raise TokenizerError(f"stop_strings={list(config.stops)} need a tokenizer. Pass tokenizer=... too.")
    return StopStrings(config.stops, tokenizer)


def _empty_prompt(config: GenerationConfig, facts: ModelFacts, number: int) -> IntArray:
    vocab_size = facts.vocab_size
    if facts.source is not None:
        return check_ids([facts.source.start_token_id], vocab_size, "decoder_start_token_id")
    if config.bos_token_id is None:
        raise EmptyPromptError(
            f"prompt {number} is empty, and the model has no beginning-of-sequence id to start from. "
            f"Give at least one token, or pass bos_token_id."
        )
    return check_ids([config.bos_token_id], vocab_size, "bos_token_id")
