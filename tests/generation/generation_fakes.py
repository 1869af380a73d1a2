"""Small engines and tokenizers whose every answer is known, and a checker of the state rule."""

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
