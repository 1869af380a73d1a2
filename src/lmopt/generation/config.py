"""Options of generation, with the names and meanings of Hugging Face's `GenerationConfig`."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, Self

from lmopt.errors import ContextLengthError
from lmopt.generation.checking import checked, checked_together
from lmopt.generation.options import check_file_value, reject_option

_logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS: Final = 20
"""Tokens generated where no limit is given; transformers' own default."""

_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "typical_p")
# What `None` from a caller means where it is not simply the default: no restriction.
_NONE_MEANS: Final = {"top_k": 0}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to turn logits into tokens.

    Names, defaults and meanings are transformers'. lmopt's own are `logprobs` and `seed`. Lists are
    kept as tuples, so a config can be hashed and shared.

    Attributes:
        max_new_tokens: Most new tokens. Takes precedence over `max_length`; without either, 20, or
            what the context has room for.
        max_length: Most tokens, prompt included.
        min_new_tokens: End-of-sequence ids are impossible before so many new tokens.
        min_length: The same, prompt included.
        do_sample: Draw tokens; else take the likeliest. See `from_options`.
        temperature: Divides the logits, > 0.
        top_k: Keep the so many likeliest tokens; 0 keeps all. 50 by default, as in transformers.
        top_p: Keep the smallest set of likeliest tokens with this probability (nucleus sampling,
            Holtzman et al., arXiv:1904.09751).
        min_p: Keep tokens at least `min_p` times as likely as the likeliest (arXiv:2407.01082).
        typical_p: Keep the tokens whose information is nearest to the entropy, up to this
            probability (locally typical sampling, arXiv:2202.00666).
        repetition_penalty: > 1 makes tokens of prompt and output less likely (arXiv:1909.05858).
        no_repeat_ngram_size: n-grams of this size occur once only, prompt included; 0 is off.
        bad_words_ids: Token sequences that must not be completed.
        suppress_tokens: Ids that are never generated.
        begin_suppress_tokens: Ids that are not generated as first new token.
        forced_bos_token_id: Id forced after a prompt of one token.
        forced_eos_token_id: Id forced as last token when the length limit is reached.
        renormalize_logits: Log-softmax after all processors; changes scores of beams only.
        num_beams: Beams of beam search; 1 is off.
        length_penalty: Exponent of the length that divides beam scores.
        early_stopping: When beam search ends: `True` at `num_beams` finished beams, `False` by a
            heuristic, `"never"` when no better beam can exist.
        num_return_sequences: Sequences per prompt; needs sampling or beams.
        eos_token_id: Ids that end a sequence.
        pad_token_id: Accepted and unused: results are lists without padding.
        bos_token_id: Start of an empty prompt.
        stop_strings: Strings that end a sequence, across token borders.
        logprobs: `True` for the log-probability of each new token, a number `n >= 1` for the top
            `n` besides; `False` or 0 for none.
        seed: One seed for every prompt of the request, or one a prompt. The tokens of a row are a
            function of its seed, its sequence number and the positions, so equal prompts with
            equal seeds give equal text. `None` draws fresh ones (see `Generation.seed`).
        max_time: Most seconds from the call on. What is there by then is returned, with the
            `finish_reason` `"time"`. It is looked at between two calls of the engine.
        prompt_lookup_num_tokens: Most tokens of a draft in prompt lookup decoding: where the last
            tokens of a row have occurred before, what followed them is read in one call, and kept as
            far as it is what would have been chosen anyway. The tokens are the same as without, and
            come sooner where the output repeats the prompt (quoting, editing, code). It pauses by
            itself where it does not pay; an engine that cannot rewind decodes plainly.
        max_matching_ngram_size: Most tokens that must have occurred before; 3 where `None`.
        return_timestamps: Whether a Whisper model writes when each stretch of speech begins and ends, as tokens
            between the words, by the rules of its authors (arXiv:2212.04356). Its `decoder_input_ids` then leave
            `no_timestamps_token_id` out. Where its tokenizer has these tokens, and not as special ones, they stand in
            `Generation.text`; `Runtime.transcribe` reads them.
        no_timestamps_token_id: Token before the first of time, 0.00 s; for `return_timestamps`.
        max_initial_timestamp_index: Latest begin of the first stretch, in steps of 0.02 s.

    Raises:
        UnsupportedOptionError: A value has the wrong type or range, or two contradict each other.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    renormalize_logits: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    logprobs: bool | int = False
    seed: int | Sequence[int] | None = None
    max_time: float | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    return_timestamps: bool = False
    no_timestamps_token_id: int | None = None
    max_initial_timestamp_index: int | None = None

    def __post_init__(self) -> None:
        """Check every value and turn lists into tuples."""
        for field in fields(self):
            object.__setattr__(self, field.name, checked(field.name, getattr(self, field.name)))
        checked_together(self)

    @classmethod
    def from_options(cls, defaults: Mapping[str, Any] | None = None, **options: Any) -> Self:
        """Combine a model's `generation_config.json` with a caller's options.

        - An option wins over the file. `None` as option takes back what the file says.
        - A sampling option (`temperature`, `top_k`, `top_p`, `min_p`, `typical_p`) turns sampling
          on, unless the caller also says `do_sample`. The same values in the file do not.
        - `max_length` as option also takes back a `max_new_tokens` of the file.
        - In the file, bookkeeping fields (`transformers_version`, `use_cache`, ...) are skipped,
          fields that transformers does not know are skipped with a logged warning, and fields
          that would change the result and are not implemented here raise.

        Args:
            defaults: The parsed file, or `None`.
            **options: Fields of this class.

        Raises:
            UnsupportedOptionError: Unknown or unsupported option, or a value out of range.
        """
        known = {field.name: field.default for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in (defaults or {}).items():
            if name in known:
                # `null` in a file is "not set", and so is the `false` that older files write for a number.
                if value is not None and not (value is False and known[name] is None):
                    values[name] = value
            elif name not in options and not check_file_value(name, value):
                _logger.warning("generation_config.json: %r is not a known option and is ignored", name)
        for name, value in options.items():
            if name not in known:
                reject_option(name, value, known)
            elif value is None:
                values[name] = _NONE_MEANS.get(name, known[name])
            else:
                values[name] = value
        if options.get("max_length") is not None and options.get("max_new_tokens") is None:
            values.pop("max_new_tokens", None)
        if options.get("do_sample") is None and any(options.get(name) is not None for name in _SAMPLING):
            values["do_sample"] = True
        return cls(**values)

    def with_options(self, **options: Any) -> Self:
        """Copy with some fields changed and everything checked again."""
        return replace(self, **options)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids, possibly none."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else ()

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, possibly none."""
        return self.stop_strings if isinstance(self.stop_strings, tuple) else ()

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities of the new tokens are asked for."""
        return self.logprobs is True or self.logprobs > 0

    @property
    def top_logprobs(self) -> int:
        """Number of most likely tokens to report at each position."""
        return 0 if isinstance(self.logprobs, bool) else int(self.logprobs)

    def new_tokens(self, prompt_length: int, context_length: int | None) -> int:
        """Most new tokens for a prompt.

        Args:
            prompt_length: Tokens of the prompt.
            context_length: Positions that the model has, `None` where it has no limit.

        Raises:
            ContextLengthError: They do not fit into the model's context, or the prompt alone is
                longer than `max_length`.
        """
        room = math.inf if context_length is None else context_length - prompt_length
        if self.max_new_tokens is not None:
            wanted, asked = self.max_new_tokens, f"max_new_tokens={self.max_new_tokens}"
        elif self.max_length is not None:
            wanted, asked = self.max_length - prompt_length, f"max_length={self.max_length}"
        else:
            wanted, asked = int(max(1, min(DEFAULT_NEW_TOKENS, room))), "at least one new token"
        if wanted < 1:
            raise ContextLengthError(
                f"the prompt has {prompt_length} tokens, {asked} leaves no room for a new one. "
                f"Shorten the prompt, or pass max_new_tokens."
            )
        if wanted > room:
            raise ContextLengthError(
                f"a prompt of {prompt_length} tokens and {asked} do not fit into the model's context of "
                f"{context_length} tokens. Shorten the prompt, or pass a lower max_new_tokens "
                f"(at most {max(0, int(room))} here)."
            )
        return wanted

    def seed_of(self, prompt: int) -> int | None:
        """Seed of one prompt of the request, `None` where a fresh one is wanted."""
        return self.seed[prompt] if isinstance(self.seed, tuple) else self.seed  # type: ignore[return-value]
