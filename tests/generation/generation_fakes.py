"""Small engines and tokenizers whose every answer is known, and a checker of the state rule."""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lmopt.contracts import EngineReport
from lmopt.types import ModelFacts


@dataclass
class HashState:
    """One running hash a row; knows whether it was consumed."""

    values: np.ndarray
    lengths: np.ndarray
    consumed: bool = False


@dataclass
class HashEngine:
    """Logits are a pseudo-random function of all tokens that a row has read: a recurrent model.

    Refuses a state that was consumed, counts calls, and where `ragged` is false also refuses
    unequal rows. Padding is read as garbage, so looking at it would show.
    """

    vocab_size: int = 50
    context_length: int | None = None
    ragged: bool = True
    scale: float = 3.0
    calls: list[tuple[int, int]] = field(default_factory=list)
    selects: int = 0

    @property
    def facts(self):
        return ModelFacts(self.vocab_size, self.context_length)

    def begin(self, batch, *, capacity=None, padding_side="right"):
        assert batch >= 1
        return HashState(np.full(batch, 17, np.uint64), np.zeros(batch, np.int64))

    def forward(self, input_ids, lengths, state, *, last_only=False):
        assert input_ids.dtype == np.int64
        assert input_ids.ndim == 2
        assert lengths.dtype == np.int64
        assert (lengths >= 1).all()
        assert lengths.max() <= input_ids.shape[1]
        assert input_ids.shape[0] == state.values.size == lengths.size
        values, read = self._consume(state)
        if not self.ragged:
            assert len(set(lengths.tolist())) == 1
            assert len(set(read.tolist())) == 1
        self.calls.append(input_ids.shape)
        logits = np.full((*input_ids.shape, self.vocab_size), np.nan, np.float32)
        for row, length in enumerate(lengths):
            for place, token in enumerate(input_ids[row, :length].tolist()):
                values[row] = np.uint64((int(values[row]) * 6364136223846793005 + token + 1) % 2**64)
                logits[row, place] = self._logits(int(values[row]))
        state = HashState(values, read + lengths)
        if last_only:
            logits = logits[np.arange(lengths.size), lengths - 1][:, None]
        return logits, state

    def _logits(self, value: int) -> np.ndarray:
        return (np.random.default_rng(value).standard_normal(self.vocab_size) * self.scale).astype(np.float32)

    def select(self, state, rows):
        assert rows.dtype == np.int64
        self.selects += 1
        values, lengths = self._consume(state)
        return HashState(values[rows], lengths[rows])

    def join(self, states):
        parts = [self._consume(state) for state in states]
        lengths = np.concatenate([part[1] for part in parts])
        if not self.ragged:
            assert len(set(lengths.tolist())) == 1
        return HashState(np.concatenate([part[0] for part in parts]), lengths)

    @staticmethod
    def _consume(state):
        assert not state.consumed, "a consumed state was used again"
        state.consumed = True
        return state.values.copy(), state.lengths.copy()

    def report(self):
        return EngineReport("hash", "cpu", "float32", 0)

    def close(self):
        pass


@dataclass(eq=False)
class PastState:
    """Every hash that a row went through, so that it can go back; knows whether it was consumed."""

    pasts: list[list[int]]
    capacity: int | None = None
    consumed: bool = False

    @property
    def lengths(self):
        return np.array([len(past) - 1 for past in self.pasts], np.int64)


@dataclass
class RewindEngine(HashEngine):
    """A `HashEngine` that remembers: its rows can be rewound and copied, as with a key-value cache.

    `read` counts the tokens that it was given, padding left out; `alive` holds the states that somebody
    still refers to.
    """

    rewinds: bool = True
    read: int = 0
    rewound: int = 0
    alive: weakref.WeakSet = field(default_factory=weakref.WeakSet)

    def _state(self, pasts, capacity):
        state = PastState(pasts, capacity)
        self.alive.add(state)
        return state

    def begin(self, batch, *, capacity=None, padding_side="right"):
        return self._state([[17] for _ in range(batch)], capacity)

    def forward(self, input_ids, lengths, state, *, last_only=False):
        assert input_ids.dtype == lengths.dtype == np.int64
        assert input_ids.shape[0] == len(state.pasts) == lengths.size
        assert lengths.min() >= 1
        assert lengths.max() <= input_ids.shape[1]
        if not self.ragged:
            assert len(set(lengths.tolist())) == len(set(state.lengths.tolist())) == 1
        pasts = self._consume(state)
        self.calls.append(input_ids.shape)
        self.read += int(lengths.sum())
        width = 1 if last_only else input_ids.shape[1]
        logits = np.full((*input_ids.shape[:1], width, self.vocab_size), np.nan, np.float32)
        for row, length in enumerate(lengths):
            for place, token in enumerate(input_ids[row, :length].tolist()):
                pasts[row].append((pasts[row][-1] * 6364136223846793005 + token + 1) % 2**64)
                if not last_only:
                    logits[row, place] = self._logits(pasts[row][-1])
            if last_only:
                logits[row, 0] = self._logits(pasts[row][-1])
            assert state.capacity is None or len(pasts[row]) - 1 <= state.capacity
        return logits, self._state(pasts, state.capacity)

    def select(self, state, rows):
        self.selects += 1
        pasts = self._consume(state)
        return self._state([list(pasts[row]) for row in rows], state.capacity)

    def join(self, states):
        capacities = [state.capacity for state in states]
        if not self.ragged:
            assert len({length for state in states for length in state.lengths.tolist()}) == 1
        pasts = [past for state in states for past in self._consume(state)]
        return self._state(pasts, None if None in capacities else max(capacities))

    def rewind(self, state, lengths):
        assert (lengths <= state.lengths).all()
        assert (lengths >= 0).all()
        self.rewound += int((state.lengths - lengths).sum())
        pasts = self._consume(state)
        return self._state([p[: n + 1] for p, n in zip(pasts, lengths, strict=True)], state.capacity)

    def copy(self, state, *, capacity=None):
        assert not state.consumed
        assert capacity is None or capacity >= state.lengths.max()
        return self._state([list(past) for past in state.pasts], capacity or state.capacity)

    @staticmethod
    def _consume(state):
        assert not state.consumed, "a consumed state was used again"
        state.consumed = True
        return [list(past) for past in state.pasts]


@dataclass
class EchoEngine(RewindEngine):
    """Says what follows the last token in `text`, strongly, with a little of the hash on top: quotes."""

    text: Sequence[int] = ()
    strength: float = 12.0

    def forward(self, input_ids, lengths, state, *, last_only=False):
        logits, after = super().forward(input_ids, lengths, state, last_only=last_only)
        following = dict(itertools.pairwise(self.text))
        for row, length in enumerate(lengths):
            for place in range(length):
                if not last_only or place == length - 1:
                    token = following.get(int(input_ids[row, place]))
                    if token is not None:
                        logits[row, 0 if last_only else place, token] += self.strength
        return logits, after


@dataclass
class ConstantEngine(HashEngine):
    """The same logits after every token."""

    logits: np.ndarray = field(default_factory=lambda: np.zeros(4, np.float32))

    def __post_init__(self):
        self.vocab_size = self.logits.size

    def _logits(self, value):
        return self.logits


@dataclass
class ScriptEngine(HashEngine):
    """Says a script: after the n-th token read comes `script[n]`, whatever was read."""

    script: Sequence[int] = ()
    prompt: int = 1

    def forward(self, input_ids, lengths, state, *, last_only=False):
        _, after = super().forward(input_ids, lengths, state, last_only=last_only)
        logits = np.zeros((lengths.size, 1, self.vocab_size), np.float32)
        for row, read in enumerate(after.lengths):
            logits[row, 0, self.script[int(read) - self.prompt]] = 9.0
        return logits, after


class ByteTokenizer:
    """Tokens are byte strings, as in byte-level BPE; decoding is lossy UTF-8 of all bytes together."""

    def __init__(self, tokens: Sequence[bytes | str]):
        self.tokens = list(tokens)  # a `str` is a special token
        self.decoded = 0

    def decode(self, ids, skip_special_tokens=True):
        ids = list(ids)
        self.decoded += len(ids)
        text, pending = "", b""
        for token in (self.tokens[number] for number in ids):
            if isinstance(token, bytes):
                pending += token
            elif not skip_special_tokens:
                text, pending = text + pending.decode(errors="replace") + token, b""
        return text + pending.decode(errors="replace")

    def id_to_token(self, number):
        token = self.tokens[number]
        return token if isinstance(token, str) else token.decode("latin-1")
