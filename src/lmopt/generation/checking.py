"""Types and ranges of the fields of `GenerationConfig`."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from lmopt.errors import UnsupportedOptionError

if TYPE_CHECKING:
    from lmopt.generation.config import GenerationConfig

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
    "prompt_lookup_num_tokens": 1,
    "max_matching_ngram_size": 1,
    "no_timestamps_token_id": 0,
    "max_initial_timestamp_index": 0,
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
    "max_time": (0.0, math.inf, False, False),
}
_MOST_SEED: Final = 2**64 - 1


def checked(name: str, value: Any) -> Any:
    """Give the value of one field in the form that is kept.

    Raises:
        UnsupportedOptionError: Its type or range is wrong.
    """
    if name in _AT_LEAST:
        return value if value is None else _integer(name, value, _AT_LEAST[name])
    if name in _BETWEEN:
        return value if value is None else _number(name, value, *_BETWEEN[name])
    return value if value is None and name not in _NEVER_NONE else _OTHERS[name](name, value)


def checked_together(config: "GenerationConfig") -> None:
    """Refuse fields that contradict each other.

    Raises:
        UnsupportedOptionError: Two of them do.
    """
    if config.num_beams > 1 and config.do_sample:
        raise UnsupportedOptionError(
            f"num_beams={config.num_beams} with sampling (beam sampling) is not implemented. "
            f"Pass do_sample=False for beam search, or num_beams=1 for sampling."
        )
    if config.num_beams > 1 and config.top_logprobs:
        raise UnsupportedOptionError(
            f"logprobs={config.logprobs} with num_beams={config.num_beams}: beam search reports the "
            f"log-probabilities of its tokens only. Pass logprobs=True."
        )
    if config.num_beams > 1 and config.prompt_lookup_num_tokens is not None:
        raise UnsupportedOptionError(
            f"prompt_lookup_num_tokens={config.prompt_lookup_num_tokens} with num_beams={config.num_beams}: "
            f"prompt lookup decodes one sequence at a time. Pass num_beams=1, or leave it out."
        )
    if config.num_return_sequences > config.num_beams > 1:
        raise _wrong(
            "num_return_sequences", config.num_return_sequences, f"at most num_beams={config.num_beams}"
        )
    if config.num_return_sequences > 1 and config.num_beams == 1 and not config.do_sample:
        raise UnsupportedOptionError(
            f"num_return_sequences={config.num_return_sequences}: greedy decoding has one result only. "
            f"Pass do_sample=True, or num_beams={config.num_return_sequences}."
        )
    if config.return_timestamps and (config.no_timestamps_token_id is None or not config.eos_ids):
        raise UnsupportedOptionError(
            "return_timestamps=True needs no_timestamps_token_id and eos_token_id, which a Whisper model's "
            "generation_config.json has. Pass them, or leave it out."
        )
    if config.min_new_tokens and config.max_new_tokens and config.min_new_tokens > config.max_new_tokens:
        raise _wrong(
            "min_new_tokens", config.min_new_tokens, f"at most max_new_tokens={config.max_new_tokens}"
        )


def _integer(name: str, value: object, least: int | None) -> int:
    if not _is_integer(value) or (least is not None and value < least):
        raise _wrong(name, value, "an integer" if least is None else f"an integer >= {least}")
    return int(value)


def _number(name: str, value: object, low: float, high: float, with_low: bool, with_high: bool) -> float:
    span = f"a number in {'[' if with_low else '('}{low:g}, {high:g}{']' if with_high else ')'}"
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not (low < number < high or (with_low and number == low) or (with_high and number == high)):
        hint = " For greedy decoding leave it out, or pass do_sample=False." if name == "temperature" else ""
        raise _wrong(name, value, f"{span}.{hint}")
    return number


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")
    return value


def _ids(name: str, value: object) -> tuple[int, ...]:
    """Turn an id or a list of ids into a tuple."""
    if _is_integer(value) and value >= 0:
        return (int(value),)
    if not isinstance(value, Sequence) or not all(_is_integer(token) and token >= 0 for token in value):
        raise _wrong(name, value, "token ids >= 0")
    return tuple(dict.fromkeys(map(int, value))) if name != "bad_words_ids" else tuple(map(int, value))


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    words = tuple(_ids(name, word) for word in value)
    if not all(words):
        raise _wrong(name, value, "lists with at least one token id each")
    return words


def _strings(name: str, value: Any) -> tuple[str, ...] | None:
    strings = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) and text for text in strings):
        raise _wrong(name, value, "strings that are not empty")
    return strings or None


def _early(name: str, value: object) -> object:
    if value not in (True, False, "never"):
        raise _wrong(name, value, 'True, False or "never"')
    return value


def _logprobs(name: str, value: object) -> object:
    if not isinstance(value, bool) and not (_is_integer(value) and value >= 0):
        raise _wrong(name, value, "True, False or a number >= 0")
    return value


def _seed(name: str, value: object) -> int | tuple[int, ...]:
    seeds: Sequence[object] = value if isinstance(value, Sequence) else (value,)
    if not all(_is_integer(seed) and 0 <= seed <= _MOST_SEED for seed in seeds):
        raise _wrong(name, value, f"an integer in [0, {_MOST_SEED}], or one a prompt")
    numbers = tuple(int(seed) for seed in seeds if _is_integer(seed))
    return numbers if isinstance(value, Sequence) else numbers[0]


_OTHERS: Final[dict[str, Callable[[str, Any], Any]]] = {
    "do_sample": _flag,
    "renormalize_logits": _flag,
    "return_timestamps": _flag,
    "eos_token_id": _ids,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "bad_words_ids": _words,
    "stop_strings": _strings,
    "early_stopping": _early,
    "logprobs": _logprobs,
    "seed": _seed,
}
_NEVER_NONE: Final = ("do_sample", "renormalize_logits", "return_timestamps", "early_stopping", "logprobs")


def _is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer of Python or NumPy, and not a truth value."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _wrong(name: str, value: object, expected: str) -> UnsupportedOptionError:
    return UnsupportedOptionError(f"{name}={value!r} is not possible; expected {expected}".rstrip(".") + ".")
