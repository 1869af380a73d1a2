"""Seeded requests of every kind, and when two answers to one may differ."""

from typing import Any

import numpy as np

from lmopt.generation import GenerationConfig
from lmopt.generation.randomness import uniform
from lmopt.generation.sampling import narrow
from lmopt.testing.models import VOCAB_SIZE

_KINDS: list[dict[str, Any]] = [
    {},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.9},
    {"do_sample": True, "temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
]
_TIE = 1e-3  # nats between two tokens, or a share of the draw, that rounding of float32 may decide


def make(count: int, seed: int = 0, **more: Any) -> list[tuple[list[int], GenerationConfig]]:
    """Prompts of 1 to 40 tokens, 1 to 24 new ones, each with a seed and options of its own."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        prompt = generator.integers(3, VOCAB_SIZE, generator.integers(1, 41)).tolist()
        options = {"max_new_tokens": int(generator.integers(1, 25)), "eos_token_id": [2, 11], **more}
        found.append((prompt, GenerationConfig(seed=number, **options, **_KINDS[number % len(_KINDS)])))
    return found


def is_tie(runtime, prompt: list[int], config: GenerationConfig, one: list[int], other: list[int]) -> bool:
    """Whether the first difference of two answers is one that rounding decides."""
    place = next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    if place >= min(len(one), len(other)) or config.repetition_penalty != 1.0:
        return False
    logits = runtime.logits([*prompt, *one[:place]])[-1]
    if not config.do_sample:
        return bool(abs(logits[one[place]] - logits[other[place]]) < _TIE)
    edges = narrow(logits, config).probabilities(logits.size).cumsum()
    drawn = uniform(config.seed, 0, len(prompt) + place)  # type: ignore[arg-type]
    return bool(np.abs(edges - drawn).min() < _TIE)
