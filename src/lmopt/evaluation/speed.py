"""How fast an engine reads prompts and generates tokens: the one path behind every printed figure.

A round is one prompt read from an empty state and `new_tokens` greedy tokens, one call each. Rounds
that warm up the engine are not counted. Each figure is the median over rounds, and its spread is the
least and the largest round: on a shared machine that says more than a deviation does.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lmopt.contracts import Engine
from lmopt.errors import ContextLengthError, InputError
from lmopt.types import IntArray, ModelFacts


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured quantity over rounds.

    Attributes:
        median: Median over rounds.
        least: Smallest round.
        most: Largest round.
    """

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Summarise one value a round."""
        return cls(float(np.median(values)), float(min(values)), float(max(values)))

    def __str__(self) -> str:
        """Show the median and the spread with three digits."""
        return f"{self.median:.3g} ({self.least:.3g} .. {self.most:.3g})"


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of an engine. Rates count the tokens of all rows of the batch.

    Attributes:
        first_token_ms: Time from the call with the prompt to the first new token.
        prefill_tokens_per_s: Prompt tokens read a second.
        decode_tokens_per_s: New tokens a second after the first.
        token_p50_ms: Median time between two new tokens of a row.
        token_p95_ms: 95th percentile of it.
        prompt_tokens: Tokens of a prompt.
        new_tokens: New tokens a row.
        rounds: Counted rounds.
        batch: Rows.
    """

    first_token_ms: Figure
    prefill_tokens_per_s: Figure
    decode_tokens_per_s: Figure
    token_p50_ms: Figure
    token_p95_ms: Figure
    prompt_tokens: int
    new_tokens: int
    rounds: int
    batch: int

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as plain values."""
        return asdict(self)


def measure_speed(
    engine: Engine,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    rounds: int = 3,
    batch: int = 1,
    seed: int = 0,
    warm_up: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Measure one engine; see `compare_speed` for figures whose ratio is to be quoted.

    Args:
        engine: The engine.
        prompt_tokens: Tokens of the (random) prompt, at least 1.
        new_tokens: Tokens to generate, at least 2.
        rounds: Rounds that count, at least 1.
        batch: Rows at once.
        seed: Seed of the prompt.
        warm_up: Rounds before the first that counts.
        progress: Called with the number of rounds done and their total, warm-up included.

    Raises:
        InputError: A size is too small.
        ContextLengthError: The tokens do not fit the model's context.
    """
    return compare_speed(
        {"": engine},
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        batch=batch,
        seed=seed,
        warm_up=warm_up,
        progress=progress,
    )[""]


def compare_speed(
    engines: Mapping[str, Engine],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    rounds: int = 3,
    batch: int = 1,
    seed: int = 0,
    warm_up: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Speed]:
    """Measure engines side by side, round by round in turn, so that their ratios are fair.

    A machine that slows down for a minute then slows all of them. The order is reversed every other
    round, so that none of them always runs behind the same neighbour.

    Args:
        engines: Engines by name; they must stay open all the while.
        prompt_tokens: Tokens of the (random) prompt, at least 1.
        new_tokens: Tokens to generate, at least 2.
        rounds: Rounds that count, at least 1.
        batch: Rows at once.
        seed: Seed of the prompt.
        warm_up: Rounds of each engine before the first that counts.
        progress: Called with the number of rounds done and their total, warm-up included.

    Returns:
        Name to speed, in the order given.

    Raises:
        InputError: A size is too small, or no engine is given.
        ContextLengthError: The tokens do not fit a model's context.
    """
    if not engines or prompt_tokens < 1 or new_tokens < 2 or rounds < 1 or batch < 1 or warm_up < 0:
        raise InputError(
            "a measurement of speed needs an engine, prompt_tokens >= 1, new_tokens >= 2, rounds >= 1, "
            f"batch >= 1 and warm_up >= 0; given: {len(engines)} engines, prompt_tokens={prompt_tokens}, "
            f"new_tokens={new_tokens}, rounds={rounds}, batch={batch}, warm_up={warm_up}."
        )
    for name, engine in engines.items():
        _check_context(name, engine.facts, prompt_tokens + new_tokens)
    total = (warm_up + rounds) * len(engines)
    laps: dict[str, list[tuple[float, IntArray]]] = {name: [] for name in engines}
    done = 0
    for turn in range(warm_up + rounds):
        order = list(engines) if turn % 2 == 0 else list(engines)[::-1]
        for name in order:
            if progress is not None:
                progress(done, total)
            lap = _lap(engines[name], prompt_tokens, new_tokens, batch, seed)
            if turn >= warm_up:
                laps[name].append(lap)
            done += 1
    if progress is not None:
        progress(total, total)
    return {name: _summary(laps[name], prompt_tokens, new_tokens, batch) for name in engines}


def _check_context(name: str, facts: ModelFacts, tokens: int) -> None:
    if facts.context_length is not None and tokens > facts.context_length:
        raise ContextLengthError(
            f"{tokens} tokens do not fit the context of {facts.context_length} of {name or 'this model'}; "
            "lower prompt_tokens or new_tokens."
        )


def _lap(
    engine: Engine, prompt_tokens: int, new_tokens: int, batch: int, seed: int
) -> tuple[float, IntArray]:
    """One round: seconds to the first token, and nanoseconds between the tokens that follow."""
    vocab = engine.facts.vocab_size
    ids = np.random.default_rng(seed).integers(vocab // 8, vocab - vocab // 8, (batch, prompt_tokens))
    lengths, one = np.full(batch, prompt_tokens, dtype=np.int64), np.ones(batch, dtype=np.int64)
    stamps = np.zeros(new_tokens, dtype=np.int64)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()  # a pause of the collector would be counted as the engine's
    try:
        start = time.perf_counter_ns()
        state = engine.begin(batch, capacity=prompt_tokens + new_tokens)
        logits, state = engine.forward(ids, lengths, state, last_only=True)
        for step in range(new_tokens):
            token = logits[:, -1].argmax(axis=-1)
            stamps[step] = time.perf_counter_ns()
            if step < new_tokens - 1:
                logits, state = engine.forward(token[:, None], one, state, last_only=True)
    finally:
        if collects:
            gc.enable()
    return (stamps[0] - start) / 1e9, np.diff(stamps)


def _summary(laps: list[tuple[float, IntArray]], prompt_tokens: int, new_tokens: int, batch: int) -> Speed:
    firsts = [max(first, 1e-9) for first, _ in laps]
    steps = [between / 1e6 for _, between in laps]
    return Speed(
        first_token_ms=Figure.of([first * 1e3 for first in firsts]),
        prefill_tokens_per_s=Figure.of([batch * prompt_tokens / first for first in firsts]),
        decode_tokens_per_s=Figure.of(
            [batch * len(step) / max(float(step.sum()), 1e-6) * 1e3 for step in steps]
        ),
        token_p50_ms=Figure.of([float(np.percentile(step, 50)) for step in steps]),
        token_p95_ms=Figure.of([float(np.percentile(step, 95)) for step in steps]),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=len(laps),
        batch=batch,
    )
