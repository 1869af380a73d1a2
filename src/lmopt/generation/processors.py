"""Changes to the logits of one row before a token is chosen: penalties, bans and forced tokens.

Order and arithmetic are those of transformers 5.23 (`_get_logits_processor`), each on one row at a
time, so that a row's result cannot depend on its neighbours or on padding. A processor changes the
scores in place. What narrows the choice further when sampling (temperature, top-k, ...) is in
`lmopt.generation.sampling`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lmopt.errors import TokenIdError
from lmopt.generation.config import GenerationConfig
from lmopt.generation.history import History
from lmopt.types import FloatArray, IntArray


class Processor(Protocol):
    """Changes the `(vocab_size,)` float32 scores of one row in place.

    Attributes:
        only_bans: Whether it sets scores to minus infinity and does nothing else, and sets the same ones where all
            scores are higher or lower by one number: logits will do in the place of log-probabilities then.
    """

    only_bans: ClassVar[bool]

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Change `scores`, given what the row has seen."""
        ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Divide positive and multiply negative scores of tokens already seen (arXiv:1909.05858)."""

    only_bans: ClassVar[bool] = False
    penalty: float

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Scale the scores of the seen tokens."""
        seen = history.seen
        score = scores[seen]
        penalty = np.float32(self.penalty)
        # A token seen twice is written twice with the same value, as `scatter` does there.
        scores[seen] = np.where(score < 0, score * penalty, score / penalty)


@dataclass(frozen=True)
class NoRepeatNgram:
    """Ban every token that would complete an n-gram a second time."""

    only_bans: ClassVar[bool] = True
    size: int

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Ban the last token of each window that begins as the row ends."""
        seen = history.seen
        if seen.size < self.size:
            return
        windows = sliding_window_view(seen, self.size)
        begun = seen[seen.size + 1 - self.size :]
        matches = (windows[:, :-1] == begun).all(axis=1)
        scores[windows[matches, -1]] = -np.inf


@dataclass(frozen=True)
class BadWords:
    """Ban the last token of each sequence whose beginning has just been seen."""

    only_bans: ClassVar[bool] = True
    words: tuple[tuple[int, ...], ...]

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Ban the words that are complete but for one token."""
        seen = history.seen
        for *prefix, last in self.words:
            if not prefix or (len(prefix) <= seen.size and (seen[seen.size - len(prefix) :] == prefix).all()):
                scores[last] = -np.inf


@dataclass(frozen=True)
class MinLength:
    """Ban end-of-sequence ids until so many tokens are there."""

    only_bans: ClassVar[bool] = True
    tokens: int
    new_only: bool
    eos: IntArray

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Ban the ids while the row is too short."""
        if history.length - (history.prompt_length if self.new_only else 0) < self.tokens:
            scores[self.eos] = -np.inf


@dataclass(frozen=True)
class ForcedFirst:
    """Force a token after a prompt of one token."""

    only_bans: ClassVar[bool] = False
    token: int

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Force the token if it is due."""
        if history.length == 1:
            _force(scores, self.token)


@dataclass(frozen=True)
class ForcedLast:
    """Force a token where the length limit is reached."""

    only_bans: ClassVar[bool] = False
    token: int

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Force the token if it is due."""
        if history.length == history.max_length - 1:
            _force(scores, self.token)


@dataclass(frozen=True)
class Suppress:
    """Ban tokens."""

    only_bans: ClassVar[bool] = True
    tokens: IntArray

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Ban the tokens."""
        scores[self.tokens] = -np.inf


@dataclass(frozen=True)
class SuppressFirst:
    """Ban tokens as first new token, or as second where the first one is forced."""

    only_bans: ClassVar[bool] = True
    tokens: IntArray
    first_is_forced: bool

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Ban the tokens if the first new one is due."""
        forced = self.first_is_forced and history.prompt_length == 1
        if history.length == history.prompt_length + forced:
            scores[self.tokens] = -np.inf


@dataclass(frozen=True)
class Timestamps:
    """Let a Whisper model write times by the rules of its authors (arXiv:2212.04356).

    Times stand in pairs around text, never go back, begin the row, and win where all of them together are likelier
    than the likeliest text. As transformers' `WhisperTimeStampLogitsProcessor`.
    """

    only_bans: ClassVar[bool] = True
    first: int
    eos: int
    latest: int | None

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Ban what would break a rule."""
        new, first = history.new, self.first
        scores[first - 1] = -np.inf
        ends_in_time = new.size > 0 and new[-1] >= first
        after_time = new.size < 2 or new[-2] >= first
        if ends_in_time and after_time:
            scores[first:] = -np.inf
        elif ends_in_time:
            scores[: self.eos] = -np.inf
        said = new[new >= first]
        if said.size:
            scores[first : said[-1] + (0 if ends_in_time and not after_time else 1)] = -np.inf
        if not new.size:
            scores[:first] = -np.inf
            if self.latest is not None:
                scores[first + self.latest + 1 :] = -np.inf
        top = scores[first:].max()
        if np.isfinite(top) and top + np.log(np.exp(scores[first:] - top).sum()) > scores[:first].max():
            scores[:first] = -np.inf


@dataclass(frozen=True)
class Renormalize:
    """Turn scores into log-probabilities."""

    only_bans: ClassVar[bool] = False

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Normalise."""
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())


def build_processors(config: GenerationConfig, vocab_size: int) -> tuple[Processor, ...]:
    """List the processors that a config asks for, in transformers' order; often none.

    Raises:
        TokenIdError: An option names an id outside the vocabulary.
    """
    eos = np.array([token for token in config.eos_ids if token < vocab_size], np.int64)
    found: list[Processor] = []
    if config.repetition_penalty != 1.0:
        found.append(RepetitionPenalty(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNgram(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        words = tuple(tuple(word) for word in config.bad_words_ids)
        _check("bad_words_ids", [token for word in words for token in word], vocab_size)
        # transformers never bans an end-of-sequence id this way.
        found.append(
            BadWords(tuple(word for word in words if word not in {(token,) for token in config.eos_ids}))
        )
    if config.min_length and eos.size:
        found.append(MinLength(config.min_length, False, eos))
    if config.min_new_tokens and eos.size:
        found.append(MinLength(config.min_new_tokens, True, eos))
    if config.forced_bos_token_id is not None:
        _check("forced_bos_token_id", [config.forced_bos_token_id], vocab_size)
        found.append(ForcedFirst(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        _check("forced_eos_token_id", [config.forced_eos_token_id], vocab_size)
        found.append(ForcedLast(config.forced_eos_token_id))
    if config.suppress_tokens:
        _check("suppress_tokens", config.suppress_tokens, vocab_size)
        found.append(Suppress(np.array(config.suppress_tokens, np.int64)))
    if config.begin_suppress_tokens:
        _check("begin_suppress_tokens", config.begin_suppress_tokens, vocab_size)
        first = np.array(config.begin_suppress_tokens, np.int64)
        found.append(SuppressFirst(first, config.forced_bos_token_id is not None))
    if config.return_timestamps:
        assert config.no_timestamps_token_id is not None
        _check("no_timestamps_token_id", [config.no_timestamps_token_id + 1], vocab_size)
        first_time, end = config.no_timestamps_token_id + 1, config.eos_ids[0]
        found.append(Timestamps(first_time, end, config.max_initial_timestamp_index))
    if config.renormalize_logits:
        found.append(Renormalize())
    return tuple(found)


def _force(scores: FloatArray, token: int) -> None:
    scores.fill(-np.inf)
    scores[token] = 0.0


def _check(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    outside = [token for token in tokens if token >= vocab_size]
    if outside:
        raise TokenIdError(f"{name} names id {outside[0]}; the vocabulary has ids 0 to {vocab_size - 1}.")
