"""N-best rescoring: a language model chooses among the texts that another model might have written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lmopt.errors import UnsupportedOptionError
from lmopt.generation.results import Generation
from lmopt.tokenizer import Tokenizer


class LanguageModel(Protocol):
    """What rescoring asks of a language model; `lmopt.Runtime` has it."""

    tokenizer: Tokenizer | None

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """Content of its `generation_config.json`."""
        ...

    def score(self, texts: Any) -> Any:
        """Log-probability of each token of rows of ids, but the first of each."""
        ...


def rescored(
    found: Sequence[Sequence[Generation]],
    language_model: LanguageModel,
    *,
    weight: float,
    word_bonus: float,
    length_penalty: float,
) -> list[list[Generation]]:
    """Order what beams have found by `log p(text | source) + weight * log p_lm(text) + word_bonus * words`.

    The language model may have any vocabulary: it reads texts.

    Args:
        found: For each source its sequences, from beam search with `length_penalty`.
        language_model: A runtime of a decoder with a tokenizer.
        weight: Factor of its log-probabilities, in nats, summed over the text; 0.1 to 0.5 is usual.
        word_bonus: Added for each word, since a language model likes short texts.
        length_penalty: That of the search.

    Returns:
        The same sequences, best first, with the sum above as `score`.

    Raises:
        UnsupportedOptionError: A number is not finite, the weight is negative, or there is no tokenizer.
    """
    if not (0 <= weight < float("inf") and abs(word_bonus) < float("inf")):
        raise UnsupportedOptionError(
            f"weight={weight!r}, word_bonus={word_bonus!r}; expected finite numbers, the weight at least 0"
        )
    if language_model.tokenizer is None:
        raise UnsupportedOptionError("the language model has no tokenizer: lmopt.Runtime(..., tokenizer=...)")
    start = start_token(language_model)
    texts = [(one.text or "").strip() for several in found for one in several]
    rows = [[*start, *language_model.tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    readable = [row for row in rows if len(row) > 1]
    likely = iter(language_model.score(readable) if readable else ())
    scores = iter([float(next(likely).sum()) if len(row) > 1 else 0.0 for row in rows])
    ordered = []
    for several in found:
        judged = [
            replace(
                one,
                score=(one.score or 0.0) * len(one.token_ids) ** length_penalty
                + weight * next(scores)
                + word_bonus * len((one.text or "").split()),
            )
            for one in several
        ]
        ordered.append(sorted(judged, key=lambda one: -(one.score or 0.0)))
    return ordered


def start_token(language_model: LanguageModel) -> list[int]:
    """Give what stands for the beginning of a text, as `[id]`; `[]` for a model that knows no such token."""
    defaults = language_model.generation_defaults
    for name in ("bos_token_id", "eos_token_id"):
        found = defaults.get(name)
        if isinstance(found, list):
            found = found[0] if found else None
        if found is not None:
            return [int(found)]
    return []
