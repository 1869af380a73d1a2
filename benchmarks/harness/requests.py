"""One timed call of `Runtime.generate`, as users make it."""

import time
from collections.abc import Sequence

import numpy as np

import lmopt
from lmopt.evaluation import Lap
from lmopt.generation import GenerationConfig


def request_lap(runtime: lmopt.Runtime, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> Lap:
    """Generate once, all prompts in one call; a token's time is when the callback has it."""
    stamps: list[list[int]] = [[] for _ in prompts]
    start = time.perf_counter_ns()
    found = runtime.generate(
        prompts,
        config,
        on_token=lambda token: stamps[token.prompt].append(time.perf_counter_ns() - start),
    )
    return Lap(tuple(map(len, prompts)), np.array([one.token_ids for one in found]), np.array(stamps))
