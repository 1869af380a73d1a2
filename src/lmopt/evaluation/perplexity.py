"""Perplexity of a text, by the windowed protocol that lmopt's reference figures were measured with."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lmopt.contracts import Engine
from lmopt.errors import ContextLengthError, InputError, TokenIdError
from lmopt.evaluation.divergence import log_softmax
from lmopt.types import FloatArray


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity and how sure it is.

    Attributes:
        value: `exp(mean_nll)`.
        mean_nll: Mean negative log-likelihood of a scored token, in nats.
        stderr: Standard error of `value`, from the spread over tokens, which are taken as
            independent: it bounds noise from the choice of text and is no error of the computation.
            Two models on one text compare far more exactly than this.
        tokens_scored: Tokens that have a probability.
        tokens: Tokens of the text.
        context: Tokens of a window.
        stride: Tokens between the starts of two windows.
    """

    value: float
    mean_nll: float
    stderr: float
    tokens_scored: int
    tokens: int
    context: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        """Give the numbers as plain values."""
        return asdict(self)


def perplexity(
    engine: Engine,
    ids: Sequence[int],
    *,
    context: int = 512,
    stride: int = 512,
    bos_token_id: int | None = None,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure how well a model predicts a text.

    Windows of `context` tokens start every `stride` tokens. Each window scores the tokens that no
    earlier window has scored, given what stands before them in the window; without `bos_token_id`
    the first token of a window has nothing before it and goes unscored if it is new.

    Args:
        engine: The model.
        ids: Token ids of the whole text, without special tokens.
        context: Tokens a window, at least 2.
        stride: Tokens between window starts, 1 .. `context`. `stride == context` is quickest; a
            smaller stride gives each token more context and a lower perplexity.
        bos_token_id: Put in front of every window, where the model wants that.
        batch: Windows a call. Memory grows by `context * vocab_size * 4` bytes for each.
        progress: Called with the number of windows done and their total.

    Returns:
        Perplexity with its standard error.

    Raises:
        InputError: `context` or `stride` make no sense, or there are fewer than 2 tokens.
        ContextLengthError: A window is longer than the model's context.
        TokenIdError: An id lies outside the vocabulary.
    """
    if context < 2 or not 1 <= stride <= context or batch < 1:
        raise InputError(
            "perplexity needs context >= 2, 1 <= stride <= context and batch >= 1; "
            f"given: context={context}, stride={stride}, batch={batch}."
        )
    text = np.asarray(ids, dtype=np.int64)
    if text.ndim != 1 or text.size < 2:
        raise InputError(f"perplexity needs one row of at least 2 token ids, given shape {text.shape}.")
    facts = engine.facts
    if text.min() < 0 or text.max() >= facts.vocab_size:
        raise TokenIdError(
            f"the text holds token ids {text.min()} .. {text.max()}; the model knows "
            f"0 .. {facts.vocab_size - 1}. Is this the model's own tokenizer?"
        )
    front = [] if bos_token_id is None else [bos_token_id]
    longest = min(context, text.size) + len(front)
    if facts.context_length is not None and longest > facts.context_length:
        raise ContextLengthError(
            f"a window of {longest} tokens does not fit the model's context of {facts.context_length}; "
            f"pass context={facts.context_length - len(front)} or less."
        )

    windows: list[tuple[np.ndarray, int]] = []
    scored_to = 0
    for start in range(0, text.size, stride):
        end = min(start + context, text.size)
        windows.append((np.concatenate([front, text[start:end]]).astype(np.int64), end - scored_to))
        scored_to = end
        if end == text.size:
            break

    losses: list[np.ndarray] = []
    done = 0
    while done < len(windows):
        group = windows[done : done + batch]
        # Only the last window can be shorter: it goes alone, so that no engine has to pad.
        group = [one for one in group if len(one[0]) == len(group[0][0])]
        losses += _losses(engine, group)
        done += len(group)
        if progress is not None:
            progress(done, len(windows))
    nll = np.concatenate(losses)
    mean = float(nll.mean())
    value = math.inf if mean > 700 else math.exp(mean)
    spread = float(nll.std(ddof=1)) if nll.size > 1 else 0.0
    return Perplexity(value, mean, value * spread / math.sqrt(nll.size), nll.size, text.size, context, stride)


def _losses(engine: Engine, windows: list[tuple[np.ndarray, int]]) -> list[np.ndarray]:
    """Negative log-likelihoods of the new tokens of windows of one length."""
    ids = np.stack([window for window, _ in windows])
    lengths = np.full(len(ids), ids.shape[1], dtype=np.int64)
    logits, _ = engine.forward(ids, lengths, engine.begin(len(ids), capacity=ids.shape[1]))
    return [
        negative_log_likelihood(logits[row, :-1], window[1:])[-new:]
        for row, (window, new) in enumerate(windows)
        if len(window) > 1
    ]


def negative_log_likelihood(logits: FloatArray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target, in float64, some positions at a time.

    Args:
        logits: `(tokens, vocab_size)`.
        targets: `(tokens,)` ids.
    """
    step = max(1, (1 << 20) // logits.shape[-1])
    parts = []
    for start in range(0, len(targets), step):
        some = slice(start, start + step)
        chances = log_softmax(logits[some])
        parts.append(-np.take_along_axis(chances, targets[some, None], axis=-1)[:, 0])
    return np.concatenate(parts)
