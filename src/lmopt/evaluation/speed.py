"""How fast an engine reads prompts and generates tokens: the one path behind every printed figure.

A round is a `Lap`: prompts read from an empty state and greedy tokens, each with the time when it was
known. Laps of other programs (`benchmarks/`) are summarised by the same `Speed.of`. Rounds that warm up
the engine are not counted. Each figure is the median over rounds, and its spread is the
least and the largest round: on a shared machine that says more than a deviation does.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lmopt.contracts import Engine
from lmopt.errors import ContextLengthError, InputError, ShapeError
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
class Lap:
    """One greedy generation, timed: where every figure of speed comes from, whoever generated.

    Attributes:
        prompt_lengths: Tokens of each row's prompt.
        tokens: `(row, token)` int64, the new tokens.
        stamps_ns: `(row, token)` int64, nanoseconds from the start to when each was known.
    """

    prompt_lengths: tuple[int, ...]
    tokens: IntArray
    stamps_ns: IntArray

    def __post_init__(self) -> None:
        """Check that the arrays belong together.

        Raises:
            ShapeError: They do not, or a row has fewer than 2 new tokens.
        """
        shape = self.stamps_ns.shape
        if len(shape) != 2 or self.tokens.shape != shape or shape[0] != len(self.prompt_lengths):
            raise ShapeError(
                f"a lap of {len(self.prompt_lengths)} prompts has tokens of shape {self.tokens.shape} and "
                f"stamps of shape {shape}; both must be (prompts, new tokens)"
            )
        if shape[1] < 2:
            raise ShapeError("a lap needs two new tokens: the time between tokens is what decoding takes")

    @property
    def first_token_s(self) -> float:
        """Seconds until every row has its first token."""
        return max(float(self.stamps_ns[:, 0].max()) / 1e9, 1e-9)

    @property
    def decode_s(self) -> float:
        """Seconds from then until every row has its last."""
        return max(float(self.stamps_ns.max() - self.stamps_ns[:, 0].max()) / 1e9, 1e-9)

    @property
    def decoded_tokens(self) -> int:
        """Tokens of all rows that were chosen in that time."""
        return int((self.stamps_ns > self.stamps_ns[:, 0].max()).sum())


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of an engine. Rates count the tokens of all rows of the batch.

    Attributes:
        first_token_ms: Time from the call with the prompts until every row has its first new token.
        prefill_tokens_per_s: Prompt tokens read a second.
        decode_tokens_per_s: New tokens a second after that.
        total_tokens_per_s: New tokens over the whole time, prompts included.
        token_p50_ms: Median time between two new tokens of a row.
        token_p95_ms: 95th percentile of it.
        prompt_tokens: Tokens of a prompt, of the longest where they differ.
        new_tokens: New tokens a row.
        rounds: Counted rounds.
        batch: Rows.
    """

    first_token_ms: Figure
    prefill_tokens_per_s: Figure
    decode_tokens_per_s: Figure
    total_tokens_per_s: Figure
    token_p50_ms: Figure
    token_p95_ms: Figure
    prompt_tokens: int
    new_tokens: int
    rounds: int
    batch: int

    @classmethod
    def of(cls, laps: Sequence[Lap]) -> "Speed":
        """Summarise laps of the same sizes, one a round.

        Args:
            laps: At least one.
        """
        between = [np.diff(one.stamps_ns, axis=1) / 1e6 for one in laps]
        batch, new_tokens = laps[0].tokens.shape
        return cls(
            first_token_ms=Figure.of([one.first_token_s * 1e3 for one in laps]),
            prefill_tokens_per_s=Figure.of([sum(one.prompt_lengths) / one.first_token_s for one in laps]),
            decode_tokens_per_s=Figure.of([one.decoded_tokens / one.decode_s for one in laps]),
            total_tokens_per_s=Figure.of(
                [one.tokens.size / (one.first_token_s + one.decode_s) for one in laps]
            ),
            token_p50_ms=Figure.of([float(np.percentile(steps, 50)) for steps in between]),
            token_p95_ms=Figure.of([float(np.percentile(steps, 95)) for steps in between]),
            prompt_tokens=max(laps[0].prompt_lengths),
            new_tokens=new_tokens,
            rounds=len(laps),
            batch=batch,
        )

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
    laps: dict[str, list[Lap]] = {name: [] for name in engines}
    done = 0
    for turn in range(warm_up + rounds):
        order = list(engines) if turn % 2 == 0 else list(engines)[::-1]
        for name in order:
            if progress is not None:
                progress(done, total)
            engine = engines[name]
            lap = run_lap(engine, random_prompts(engine.facts, [prompt_tokens] * batch, seed), new_tokens)
            if turn >= warm_up:
                laps[name].append(lap)
            done += 1
    if progress is not None:
        progress(total, total)
    return {name: Speed.of(laps[name]) for name in engines}


def _check_context(name: str, facts: ModelFacts, tokens: int) -> None:
    if facts.context_length is not None and tokens > facts.context_length:
        raise ContextLengthError(
            f"{tokens} tokens do not fit the context of {facts.context_length} of {name or 'this model'}; "
            "lower prompt_tokens or new_tokens."
        )


def random_prompts(facts: ModelFacts, lengths: Sequence[int], seed: int = 0) -> list[IntArray]:
    """Draw prompts of given lengths; the rare ids at both ends of the vocabulary are left out.

    Args:
        facts: Of the model.
        lengths: Tokens of each prompt.
        seed: Of the draw.
    """
    vocab, random = facts.vocab_size, np.random.default_rng(seed)
    return [random.integers(vocab // 8, vocab - vocab // 8, length) for length in lengths]


def run_lap(engine: Engine, prompts: Sequence[Sequence[int] | IntArray], new_tokens: int) -> Lap:
    """Generate greedily once, all prompts in one batch, and time it.

    Args:
        engine: Any engine.
        prompts: Token ids of each row; of unequal lengths only where the engine is `ragged`.
        new_tokens: Tokens to generate, at least 2.
    """
    lengths = np.array([len(one) for one in prompts], dtype=np.int64)
    ids = np.zeros((len(prompts), int(lengths.max())), dtype=np.int64)
    for line, row in zip(ids, prompts, strict=True):
        line[: len(row)] = row
    one = np.ones(len(prompts), dtype=np.int64)
    stamps = np.zeros(new_tokens, dtype=np.int64)
    tokens = np.zeros((len(prompts), new_tokens), dtype=np.int64)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()  # a pause of the collector would be counted as the engine's
    try:
        start = time.perf_counter_ns()
        state = engine.begin(len(prompts), capacity=int(lengths.max()) + new_tokens)
        logits, state = engine.forward(ids, lengths, state, last_only=True)
        for step in range(new_tokens):
            tokens[:, step] = token = logits[:, -1].argmax(axis=-1)
            stamps[step] = time.perf_counter_ns() - start
            if step < new_tokens - 1:
                logits, state = engine.forward(token[:, None], one, state, last_only=True)
    finally:
        if collects:
            gc.enable()
    return Lap(tuple(lengths.tolist()), tokens, np.tile(stamps, (len(prompts), 1)))
