"""Options of generation, with the names and meanings of Hugging Face's `GenerationConfig`."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Final, Literal, Self, TypeGuard

from lmopt.errors import ContextLengthError, UnsupportedOptionError
from lmopt.generation.options import check_file_value, reject_option

_logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS: Final = 20
"""Tokens generated where no limit is given; transformers' own default."""

_AT_LEAST: Final = {
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": None,  # some published files say -1; nothing here pads with it
}
# Name -> (low, high, low itself allowed, high itself allowed).
_BETWEEN: Final = {
    "temperature": (0.0, math.inf, False, False),
    "top_p": (0.0, 1.0, True, True),
    "min_p": (0.0, 1.0, True, True),
    "typical_p": (0.0, 1.0, False, True),
    "repetition_penalty": (0.0, math.inf, False, False),
    "length_penalty": (-math.inf, math.inf, False, False),
}
_FLAGS: Final = ("do_sample", "renormalize_logits")
_ID_LISTS: Final = ("eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "typical_p")
# What `None` from a caller means where it is not simply the default: no restriction.
_NONE_MEANS: Final = {"top_k": 0}
_MOST_SEED: Final = 2**64 - 1


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

    def __post_init__(self) -> None:
        """Check every value and turn lists into tuples."""
        for name, least in _AT_LEAST.items():
            self._check_integer(name, least)
        for name, bounds in _BETWEEN.items():
            self._check_number(name, *bounds)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        for name in _ID_LISTS:
            value = getattr(self, name)
            if value is not None:
                self._set(name, _ids(name, value))
        if self.bad_words_ids is not None:
            self._set("bad_words_ids", tuple(_ids("bad_words_ids", word) for word in self.bad_words_ids))
            if not all(self.bad_words_ids):
                raise _wrong("bad_words_ids", self.bad_words_ids, "lists with at least one token id each")
        if self.stop_strings is not None:
            strings = (self.stop_strings,) if isinstance(self.stop_strings, str) else tuple(self.stop_strings)
            if not all(isinstance(text, str) and text for text in strings):
                raise _wrong("stop_strings", self.stop_strings, "strings that are not empty")
            self._set("stop_strings", strings or None)
        if self.early_stopping not in (True, False, "never"):
            raise _wrong("early_stopping", self.early_stopping, 'True, False or "never"')
        number: object = self.logprobs
        if not isinstance(number, bool) and not (_is_integer(number) and number >= 0):
            raise _wrong("logprobs", number, "True, False or a number >= 0")
        self._check_seed()
        self._check_together()

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

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_integer(self, name: str, least: int | None) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not _is_integer(value) or (least is not None and value < least):
            raise _wrong(name, value, "an integer" if least is None else f"an integer >= {least}")
        self._set(name, int(value))

    def _check_number(self, name: str, low: float, high: float, with_low: bool, with_high: bool) -> None:
        value = getattr(self, name)
        if value is None:
            return
        span = f"a number in {'[' if with_low else '('}{low:g}, {high:g}{']' if with_high else ')'}"
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
        if not (low < number < high or (with_low and number == low) or (with_high and number == high)):
            hint = (
                " For greedy decoding leave it out, or pass do_sample=False." if name == "temperature" else ""
            )
            raise _wrong(name, value, f"{span}.{hint}")
        self._set(name, number)

    def _check_seed(self) -> None:
        if self.seed is None:
            return
        seeds: Sequence[object] = self.seed if isinstance(self.seed, Sequence) else (self.seed,)
        if not all(_is_integer(seed) and 0 <= seed <= _MOST_SEED for seed in seeds):
            raise _wrong("seed", self.seed, f"an integer in [0, {_MOST_SEED}], or one a prompt")
        numbers = tuple(int(seed) for seed in seeds if _is_integer(seed))
        self._set("seed", numbers if isinstance(self.seed, Sequence) else numbers[0])

    def _check_together(self) -> None:
        if self.num_beams > 1 and self.do_sample:
            raise UnsupportedOptionError(
                f"num_beams={self.num_beams} with sampling (beam sampling) is not implemented. "
                f"Pass do_sample=False for beam search, or num_beams=1 for sampling."
            )
        if self.num_beams > 1 and self.top_logprobs:
            raise UnsupportedOptionError(
                f"logprobs={self.logprobs} with num_beams={self.num_beams}: beam search reports the "
                f"log-probabilities of its tokens only. Pass logprobs=True."
            )
        if self.num_return_sequences > self.num_beams > 1:
            raise _wrong(
                "num_return_sequences", self.num_return_sequences, f"at most num_beams={self.num_beams}"
            )
        if self.num_return_sequences > 1 and self.num_beams == 1 and not self.do_sample:
            raise UnsupportedOptionError(
                f"num_return_sequences={self.num_return_sequences}: greedy decoding has one result only. "
                f"Pass do_sample=True, or num_beams={self.num_return_sequences}."
            )
        if self.min_new_tokens and self.max_new_tokens and self.min_new_tokens > self.max_new_tokens:
            raise _wrong(
                "min_new_tokens", self.min_new_tokens, f"at most max_new_tokens={self.max_new_tokens}"
            )


def _is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer of Python or NumPy, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _ids(name: str, value: object) -> tuple[int, ...]:
    """Turn an id or a list of ids into a tuple."""
    if _is_integer(value) and value >= 0:
        return (int(value),)
    if not isinstance(value, Sequence) or not all(_is_integer(token) and token >= 0 for token in value):
        raise _wrong(name, value, "token ids >= 0")
    return tuple(dict.fromkeys(map(int, value))) if name != "bad_words_ids" else tuple(map(int, value))


def _wrong(name: str, value: object, expected: str) -> UnsupportedOptionError:
    return UnsupportedOptionError(f"{name}={value!r} is not possible; expected {expected}".rstrip(".") + ".")
