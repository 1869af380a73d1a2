"""Beam search, equal to that of transformers 5.23 (`GenerationMixin._beam_search`).

Each prompt is searched as transformers searches it alone: in a batch there, a prompt that is done may
still be looked at while others go on, but nothing is added to its result any more. Here its beams leave
the batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from lmopt.contracts import Engine
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.generation.config import GenerationConfig
from lmopt.generation.fusion import Companion, Fusion
from lmopt.generation.history import History
from lmopt.generation.interruption import Interruption
from lmopt.generation.results import FinishReason, Generation
from lmopt.generation.rows import Row
from lmopt.generation.sampling import largest_sums, log_normalizer
from lmopt.generation.sources import begin
from lmopt.generation.stopping import Detokenizer
from lmopt.types import FloatArray, IntArray

_IMPOSSIBLE: Final = np.float32(-1.0e9)  # transformers' mark for "must not be chosen"


@dataclass(frozen=True, slots=True)
class _Finished:
    """A finished sequence: its new tokens, their log-probabilities and why it ended."""

    tokens: IntArray
    logprobs: FloatArray
    reason: FinishReason


class _Search:
    """The beams of one prompt.

    Attributes:
        row: The prompt, and what ends the search from outside.
        tokens: `(beams, max_length)` int64, prompt and new tokens of the running beams.
        logprobs: `(beams, max_length)` float32, log-probability of each new token.
        scores: `(beams,)` float32, sums of log-probabilities, best first.
        length: Tokens of each running beam, prompt included.
        done: Whether the search is over.
    """

    def __init__(self, row: Row, config: GenerationConfig) -> None:
        beams = config.num_beams
        self.row = row
        self._config = config
        self.length = row.history.length
        self.done = False
        self.tokens = np.repeat(row.history.buffer[None], beams, axis=0)
        self.logprobs = np.zeros(self.tokens.shape, np.float32)
        # Only the first beam counts at the start: the others are the same.
        self.scores = np.full(beams, _IMPOSSIBLE)
        self.scores[0] = 0.0
        self._finished_scores = np.full(beams, _IMPOSSIBLE)
        self._finished: list[_Finished | None] = [None] * beams

    def histories(self) -> list[History]:
        """What each running beam has seen."""
        return [History(line, self.length, self.row.history.prompt_length) for line in self.tokens]

    def read(self, logits: FloatArray, fuse: Callable[[FloatArray], FloatArray] | None = None) -> IntArray:
        """Read the logits of all continuations and choose the beams that go on.

        Args:
            logits: `(beams, vocab_size)`, as the model gave them.
            fuse: Makes scores of log-probabilities; where `None` they are the scores.

        Returns:
            `(beams,)` int64, the beam that each new beam continues.
        """
        room = np.empty_like(logits[0])
        normalizers = np.array([log_normalizer(line, out=room) for line in logits], np.float32)
        processors = self.row.processors
        scores, less = logits, normalizers
        if fuse is not None or not all(processor.only_bans for processor in processors):
            scores, less = logits - normalizers[:, None], np.zeros_like(normalizers)
            if fuse is not None:
                scores = fuse(scores)
        elif processors:
            scores = logits.copy()
        if processors:
            for line, history in zip(scores, self.histories(), strict=True):
                for processor in processors:
                    processor(line, history)
        return self._choose(scores, less, logits, normalizers)

    def _choose(
        self, scores: FloatArray, less: FloatArray, logits: FloatArray, normalizers: FloatArray
    ) -> IntArray:
        """Choose the beams that go on by `scores - less`; `logits - normalizers` are what the model itself says."""
        beams = len(scores)
        count = max(2, 1 + len(self._config.eos_ids)) * beams
        parents, ids, best_scores = largest_sums(scores, less, self.scores, count)
        tokens, token_logprobs = self.tokens[parents], self.logprobs[parents]
        tokens[:, self.length] = ids
        token_logprobs[:, self.length] = logits[parents, ids] - normalizers[parents]
        self.length += 1
        reasons = [self._reason(line) for line in tokens]
        hits = np.array([reason is not None for reason in reasons])
        self._finish(tokens, token_logprobs, best_scores, reasons)
        going = np.where(hits, best_scores + _IMPOSSIBLE, best_scores)
        chosen = np.argsort(-going, kind="stable")[:beams]
        self.tokens, self.logprobs, self.scores = tokens[chosen], token_logprobs[chosen], going[chosen]
        self._update(bool(hits.all()))
        continued: IntArray = parents[chosen]
        return continued

    def results(self, tokenizer: Detokenizer | None) -> list[Generation]:
        """Make the best sequences, best first; of a search that was cut short, the best so far."""
        config, start = self._config, self.row.history.prompt_length
        found = [
            (float(score), sequence)
            for score, sequence in zip(self._finished_scores, self._finished, strict=True)
            if sequence is not None
        ]
        if not self.done:
            span = max(1, self.length - start) ** config.length_penalty
            for score, tokens, logprobs in zip(
                self.scores / np.float32(span), self.tokens, self.logprobs, strict=True
            ):
                if score > _IMPOSSIBLE / 2:
                    part = slice(start, self.length)
                    reason = self.row.finish_reason or "cancelled"
                    found.append((float(score), _Finished(tokens[part], logprobs[part], reason)))
            found.sort(key=lambda pair: -pair[0])
        results = []
        for score, sequence in found[: config.num_return_sequences]:
            row = self.row
            row.history.buffer[start : start + sequence.tokens.size] = sequence.tokens
            row.history.length = start + sequence.tokens.size
            row.finish_reason = sequence.reason
            results.append(
                Generation(
                    token_ids=sequence.tokens.tolist(),
                    text=None if tokenizer is None else row.text(tokenizer),
                    finish_reason=sequence.reason,
                    prompt_tokens=start,
                    logprobs=sequence.logprobs.tolist() if config.wants_logprobs else None,
                    score=score,
                )
            )
        return results

    def _reason(self, tokens: IntArray) -> FinishReason | None:
        """Why a candidate ends with its newest token."""
        if int(tokens[self.length - 1]) in self.row.eos:
            return "stop"
        if self.row.stops is not None and self.row.stops.matches(tokens[: self.length]):
            return "stop_string"
        return "length" if self.length == tokens.size else None

    def _finish(
        self, tokens: IntArray, logprobs: FloatArray, scores: FloatArray, reasons: list[FinishReason | None]
    ) -> None:
        """Put candidates that have just finished among the finished ones, where they are better."""
        beams = self._config.num_beams
        start = self.row.history.prompt_length
        scores = scores / np.float32((self.length - start) ** self._config.length_penalty)
        # A candidate beyond the best `num_beams` is there only so that enough beams go on.
        finished = [
            _Finished(tokens[n, start : self.length], logprobs[n, start : self.length], reason)
            if reason
            else None
            for n, reason in enumerate(reasons[:beams])
        ]
        running = np.array([one is None for one in finished])
        scores = np.where(running, scores[:beams] + _IMPOSSIBLE, scores[:beams])
        merged = np.concatenate([self._finished_scores, scores])
        kept = np.argsort(-merged, kind="stable")[:beams]
        everything = self._finished + finished
        self._finished = [everything[n] for n in kept]
        self._finished_scores = merged[kept]

    def _update(self, nothing_goes_on: bool) -> None:
        """Decide whether the search is over."""
        config, start = self._config, self.row.history.prompt_length
        longest = config.early_stopping == "never" and config.length_penalty > 0.0
        span = (self.tokens.shape[1] if longest else self.length) - start
        possible = self.scores[0] / np.float32(span**config.length_penalty)
        complete = None not in self._finished
        worst = self._finished_scores.min() if complete else _IMPOSSIBLE
        full = complete and config.early_stopping is True
        self.done = full or nothing_goes_on or not possible > worst


def beam_search(
    engine: Engine,
    rows: list[Row],
    config: GenerationConfig,
    tokenizer: Detokenizer | None,
    interruption: Interruption,
    fusion: Fusion | None = None,
) -> list[list[Generation]]:
    """Search for the best sequences of each prompt.

    Args:
        engine: Any engine.
        rows: One a prompt, from `prepare`.
        config: Options; `num_beams > 1`, or 1 with `fusion`.
        tokenizer: For text.
        interruption: Asked before each step; the best beams so far are returned then.
        fusion: A language model that has a say in the scores, not in `Generation.logprobs`.

    Returns:
        For each prompt its `num_return_sequences` best sequences, best first.
    """
    engine = for_unequal_rows(engine)
    beams = config.num_beams
    searches = [_Search(row, config) for row in rows]
    interruption.mark(rows)
    active = [search for search in searches if search.row.finish_reason is None]
    if not active:
        return [search.results(tokenizer) for search in searches]
    longest = max(search.row.history.max_length for search in active)
    companion = None
    if fusion is not None:
        most = max(one.row.history.max_length - one.row.history.prompt_length for one in active)
        fusion.check(engine.facts.vocab_size, most)
        companion = Companion(fusion, len(active) * beams, most)
    state = begin(engine, [search.row.source for search in active], capacity=longest)
    lengths = np.array([search.length for search in active])
    input_ids = np.zeros((len(active), lengths.max()), np.int64)
    for line, search in zip(input_ids, active, strict=True):
        line[: search.length] = search.row.history.seen
    logits, state = engine.forward(input_ids, lengths, state, last_only=True)
    repeats = np.repeat(np.arange(len(active)), beams)
    logits, state = logits[repeats], engine.select(state, repeats)
    while True:
        parents = []
        for number, search in enumerate(active):
            mine = slice(number * beams, (number + 1) * beams)
            fuse = None if companion is None else functools.partial(companion.add, rows=mine)
            parents.append(number * beams + search.read(logits[mine, -1], fuse))
        interruption.mark(search.row for search in active if not search.done)
        kept = [n for n, one in enumerate(active) if not one.done and one.row.finish_reason is None]
        if not kept:
            return [search.results(tokenizer) for search in searches]
        active = [active[number] for number in kept]
        continued = np.concatenate([parents[number] for number in kept])
        state = engine.select(state, continued)
        input_ids = np.concatenate([search.tokens[:, search.length - 1] for search in active])[:, None]
        if companion is not None:
            companion.follow(continued, input_ids)
        logits, state = engine.forward(input_ids, np.ones(len(input_ids), np.int64), state, last_only=True)
