"""What is sent back: whole answers and the pieces of streams, in the form of OpenAI's API."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lmopt.generation.results import FinishReason
from lmopt.generation.rows import Row
from lmopt.generation.streaming import IncrementalText
from lmopt.serving.orders import Order
from lmopt.serving.spelling import Spelling
from lmopt.tokenizer import Tokenizer

_json: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_FINISH: Final[dict[FinishReason, str]] = {
    "stop": "stop",
    "stop_string": "stop",
    "length": "length",
    "time": "length",
}


@dataclass(frozen=True, slots=True)
class Scored:
    """Tokens and what the model thought of them.

    Attributes:
        tokens: Ids.
        logprobs: Natural-log probability of each, `None` for a first token.
        top: At each place the likeliest ids and their log-probabilities; `None` where there are none.
        offsets: At each place the characters of the text before it.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float | None]
    top: Sequence[Mapping[int, float] | None]
    offsets: Sequence[int]


@dataclass(slots=True)
class Choice:
    """One choice of an answer while it grows.

    Attributes:
        row: Its row.
        spelled: Tokens whose log-probabilities have been given out.
        characters: Characters of text before the next token; counted where log-probabilities are wanted.
        text: Finds out how many characters a token adds.
    """

    row: Row
    characters: int
    text: IncrementalText
    spelled: int = 0

    def scored(self, tokens: int) -> Scored:
        """Give the tokens up to the one of this number that were not given yet."""
        row, first = self.row, self.spelled
        ids = row.history.new[first:tokens].tolist()
        offsets = []
        for one in ids:
            offsets.append(self.characters)
            self.characters += len(self.text.push(one))
        self.spelled = tokens
        tops: Sequence[Mapping[int, float] | None] = row.top_logprobs[first:tokens] or [None] * len(ids)
        return Scored(ids, row.logprobs[first:tokens], tops, offsets)


@dataclass(kw_only=True)
class Answer:
    """The form of the answer to one request.

    Attributes:
        order: The request.
        model: Name of the model.
        fingerprint: What computes.
        spelling: Spells tokens.
        id: Of the answer.
        created: Unix time.
    """

    order: Order
    model: str
    fingerprint: str
    spelling: Spelling
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Write once what stands in front of each piece of a stream."""
        self._front = _json({**self._head(self.piece_kind), "choices": None}).removesuffix("null}")

    kind = "text_completion"
    piece_kind = "text_completion"
    prefix = "cmpl-"

    def whole(self, choices: Sequence[dict[str, Any]], usage: Mapping[str, int]) -> dict[str, Any]:
        """Make a whole answer."""
        return {**self._head(self.kind), "choices": list(choices), "usage": usage}

    def choice(
        self, index: int, text: str, finish: FinishReason | None, scored: Scored | None
    ) -> dict[str, Any]:
        """Make one choice of a whole answer."""
        logprobs = None if scored is None else self.logprobs(scored)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": _finish(finish)}

    def opening(self, index: int, text: str) -> dict[str, Any] | None:
        """Make what a stream sends of a choice before its first token, `None` for nothing."""
        return self.delta(index, text, None, None) if text else None

    def delta(
        self, index: int, text: str, finish: FinishReason | None, scored: Scored | None
    ) -> dict[str, Any]:
        """Make one choice of a piece of a stream."""
        return self.choice(index, text, finish, scored)

    def event(self, choices: Sequence[dict[str, Any]], usage: Mapping[str, int] | None = None) -> bytes:
        """Make a server-sent event."""
        counted = f',"usage":{_json(usage)}' if self.order.include_usage else ""
        return f"data: {self._front}{_json(choices)}{counted}}}\n\n".encode()

    def logprobs(self, scored: Scored) -> dict[str, Any]:
        """Write log-probabilities in the older form, that of completions."""
        spell = self.spelling.unique
        tops: list[dict[str, float] | None] = []
        for token, logprob, top in zip(scored.tokens, scored.logprobs, scored.top, strict=True):
            if logprob is None or (top is None and self.order.top):
                tops.append(None)
            else:
                # The token itself is always there, as in OpenAI's API.
                tops.append({spell(one): value for one, value in {**(top or {}), token: logprob}.items()})
        return {
            "tokens": [spell(token) for token in scored.tokens],
            "token_logprobs": list(scored.logprobs),
            "top_logprobs": tops if self.order.top else None,
            "text_offset": list(scored.offsets),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class ChatAnswer(Answer):
    """The form of an answer in a chat."""

    kind = "chat.completion"
    piece_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def choice(
        self, index: int, text: str, finish: FinishReason | None, scored: Scored | None
    ) -> dict[str, Any]:
        """Make one choice of a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = None if scored is None else self.logprobs(scored)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish(finish)}

    def opening(self, index: int, text: str) -> dict[str, Any]:
        """Say who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(
        self, index: int, text: str, finish: FinishReason | None, scored: Scored | None
    ) -> dict[str, Any]:
        """Make one choice of a piece of a stream."""
        logprobs = None if scored is None else self.logprobs(scored)
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": _finish(finish)}

    def logprobs(self, scored: Scored) -> dict[str, Any]:
        """Write log-probabilities in the form of chats."""
        found = []
        for token, logprob, top in zip(scored.tokens, scored.logprobs, scored.top, strict=True):
            likeliest = [self._token(one, value) for one, value in (top or {}).items()]
            found.append({**self._token(token, logprob), "top_logprobs": likeliest})
        return {"content": found, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.spelling.text(token), "logprob": logprob, "bytes": self.spelling.bytes(token)}


def prompt_scored(
    ids: Sequence[int], scores: Sequence[float], tops: Sequence[Mapping[int, float]], tokenizer: Tokenizer
) -> Scored:
    """Put the log-probabilities of a prompt together; its first token has none."""
    text, offsets, characters = IncrementalText(tokenizer), [], 0
    for one in ids:
        offsets.append(characters)
        characters += len(text.push(one))
    likeliest: Sequence[Mapping[int, float] | None] = tops or [None] * len(scores)
    return Scored(ids, [None, *scores], [None, *likeliest], offsets)


def together(one: Scored, other: Scored) -> Scored:
    """Put the tokens of an answer behind those of its prompt."""
    return Scored(
        [*one.tokens, *other.tokens],
        [*one.logprobs, *other.logprobs],
        [*one.top, *other.top],
        [*one.offsets, *other.offsets],
    )


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Count tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def sse(body: Mapping[str, Any]) -> bytes:
    """Write one server-sent event."""
    return f"data: {_json(body)}\n\n".encode()


DONE: Final = b"data: [DONE]\n\n"


def _finish(reason: FinishReason | None) -> str | None:
    return None if reason is None else _FINISH[reason]
