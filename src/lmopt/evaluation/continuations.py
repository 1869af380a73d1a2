"""Log-probabilities of continuations, given contexts: a context that several share is read once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lmopt.contracts import Engine, State
from lmopt.errors import ContextLengthError, EmptyPromptError
from lmopt.generation.prompts import check_ids
from lmopt.generation.scoring import read_in_parts, token_logprobs
from lmopt.types import FloatArray, IntArray

_LOGIT_BYTES: Final = 128 * 2**20
_BATCH_TOKENS: Final = 4096


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """How likely a continuation is.

    Attributes:
        logprobs: `(tokens,)` float32, natural-log probability of each of its tokens given all before it.
        greedy: Whether each token is the most likely one at its place, so that greedy decoding would
            have written the continuation. Of equally likely tokens the one with the lowest id counts.
    """

    logprobs: FloatArray
    greedy: bool

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return float(self.logprobs.sum(dtype=np.float64))


@dataclass(frozen=True, slots=True)
class _Group:
    """One context and some of its continuations, by their numbers in the request."""

    context: IntArray
    members: tuple[int, ...]


def score_continuations(
    engine: Engine,
    pairs: Sequence[tuple[Sequence[int] | IntArray, Sequence[int] | IntArray]],
    *,
    batch_size: int = 8,
    logit_bytes: int = _LOGIT_BYTES,
    batch_tokens: int = _BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[ContinuationScore]:
    """Compute the log-probability of each token of continuations, each given its context.

    The answers of a multiple-choice question share their question: it is read once, its state is repeated, and
    only the answers are read row by row. Logits of contexts are not computed but for their last token.

    Args:
        engine: Any engine.
        pairs: Context and continuation as token ids, at least one each.
        batch_size: Most rows in one call of the engine.
        logit_bytes: Most bytes of logits in one call: longer continuations are read in parts.
        batch_tokens: Most tokens of contexts, or of continuations, in a batch, padding included; a row
            that is longer alone goes alone.
        progress: Called with the number of continuations done and their total.

    Returns:
        One score a pair, in their order.

    Raises:
        EmptyPromptError: A context or a continuation has no token.
        ContextLengthError: Context and continuation, but for its last token, which is never read, are
            longer than the model's context.
        TokenIdError: An id is outside the vocabulary.
    """
    facts = engine.facts
    contexts, rows = [], []
    for number, (before, after) in enumerate(pairs):
        context = check_ids(before, facts.vocab_size, f"context {number}")
        row = check_ids(after, facts.vocab_size, f"continuation {number}")
        if context.size == 0 or row.size == 0:
            what = "continuation" if context.size else "context"
            raise EmptyPromptError(f"{what} {number} has no token; give at least one, such as the BOS token.")
        if facts.context_length is not None and context.size + row.size - 1 > facts.context_length:
            raise ContextLengthError(
                f"context {number} has {context.size} tokens and its continuation {row.size}; the model's "
                f"context has {facts.context_length}. Shorten the context from the left."
            )
        contexts.append(context)
        rows.append(row)
    scores: list[ContinuationScore | None] = [None] * len(rows)
    done = 0
    for batch in _batches(
        _groups(engine, contexts, rows, batch_size), rows, batch_size, batch_tokens, engine.ragged
    ):
        _score_batch(engine, batch, rows, scores, logit_bytes)
        done += sum(len(group.members) for group in batch)
        if progress is not None:
            progress(done, len(rows))
    return [score for score in scores if score is not None]


def _groups(engine: Engine, contexts: list[IntArray], rows: list[IntArray], batch_size: int) -> list[_Group]:
    """Put continuations of one context together, at most `batch_size` of them; the longest contexts first."""
    by_context: dict[tuple[bytes, int], list[int]] = {}
    for number, context in enumerate(contexts):
        # An engine that takes no unequal rows must read equally long continuations.
        kind = 0 if engine.ragged else rows[number].size
        by_context.setdefault((context.tobytes(), kind), []).append(number)
    groups = [
        _Group(contexts[members[0]], tuple(members[start : start + batch_size]))
        for members in by_context.values()
        for start in range(0, len(members), batch_size)
    ]
    return sorted(groups, key=lambda one: (-one.context.size, -max(rows[n].size for n in one.members)))


def _batches(
    groups: list[_Group], rows: list[IntArray], size: int, tokens: int, ragged: bool
) -> Iterator[list[_Group]]:
    """Cut groups into batches within the limits; of equal lengths where the engine takes no others."""
    batch: list[_Group] = []
    for group in groups:
        trial = [*batch, group]
        members = [rows[number].size for one in trial for number in one.members]
        fits = len(members) <= size
        fits = fits and len(trial) * trial[0].context.size <= tokens and len(members) * max(members) <= tokens
        if not ragged:
            fits = fits and group.context.size == trial[0].context.size and len(set(members)) == 1
        if batch and not fits:
            yield batch
            trial = [group]
        batch = trial
    if batch:
        yield batch


def _score_batch(
    engine: Engine,
    batch: list[_Group],
    rows: list[IntArray],
    scores: list[ContinuationScore | None],
    logit_bytes: int,
) -> None:
    """Read the contexts, then what follows them; fills `scores`."""
    lengths = np.array([group.context.size for group in batch])
    input_ids = np.zeros((len(batch), lengths.max()), np.int64)
    for line, group in zip(input_ids, batch, strict=True):
        line[: group.context.size] = group.context
    capacity = max(group.context.size + rows[n].size - 1 for group in batch for n in group.members)
    state = engine.begin(len(batch), capacity=int(capacity))
    first, state = engine.forward(input_ids, lengths, state, last_only=True)

    logprobs: dict[int, list[FloatArray]] = {}
    greedy: dict[int, bool] = {}
    longer: list[tuple[int, int]] = []
    for place, group in enumerate(batch):
        for number in group.members:
            found, best = _judge(first[place], rows[number][:1])
            logprobs[number], greedy[number] = [found], best
            if rows[number].size > 1:
                longer.append((place, number))
    for number, found, best in _read_on(engine, state, longer, rows, logit_bytes):
        logprobs[number].append(found)
        greedy[number] = greedy[number] and best
    for number, parts in logprobs.items():
        scores[number] = ContinuationScore(np.concatenate(parts), greedy[number])


def _read_on(
    engine: Engine, state: State, longer: list[tuple[int, int]], rows: list[IntArray], logit_bytes: int
) -> Iterator[tuple[int, FloatArray, bool]]:
    """Read continuations behind their contexts, part by part, and judge each token but the first.

    Args:
        engine: Reads.
        state: That of the contexts; consumed.
        longer: Place of the context, and number of the continuation.
        rows: The continuations.
        logit_bytes: Most bytes of logits in one call.
    """
    if not longer:
        return
    state = engine.select(state, np.array([place for place, _ in longer]))
    active = [number for _, number in longer]
    width = max(1, logit_bytes // (4 * engine.facts.vocab_size * len(active)))
    for number, start, logits in read_in_parts(engine, state, rows, active, width):
        yield number, *_judge(logits, rows[number][start + 1 : start + 1 + len(logits)])


def _judge(logits: FloatArray, targets: IntArray) -> tuple[FloatArray, bool]:
    """Log-probabilities of `(n,)` targets, and whether each is the most likely one."""
    return token_logprobs(logits, targets), bool((logits.argmax(axis=-1) == targets).all())
