"""Bounds on what a deployment needs, from the shapes of its weights: nothing is run for them."""

from typing import Final

from lmopt.tuning.probe import Probe
from lmopt.tuning.space import Candidate
from lmopt.tuning.weights import ModelShape

# Files also hold a tokenizer and, in portable graphs, scales of 32 bits: a bound from below needs none of it.
_SURE: Final = 0.97
# Memory may give more than the probe has seen, which something else may have slowed down.
_FASTER: Final = 3.0


def estimate(candidate: Candidate, shape: ModelShape | None, probe: Probe | None) -> dict[str, float | None]:
    """Bound figures from below: what a limit rules out already here needs no trial.

    Args:
        candidate: What would be tried.
        shape: Of the model's weights; `None` bounds nothing.
        probe: The machine's rates; `None` bounds no time.

    Returns:
        `artifact_bytes`, `peak_memory_bytes` (weights alone) and `token_p50_ms` (the time in which memory gives all
        weights that a token reads), as far as they can be known.
    """
    if shape is None or shape.quantized:
        return {}
    steps = candidate.recipe.made()
    size = shape.bytes_after(steps)
    if size is None:
        return {}
    found: dict[str, float | None] = {"artifact_bytes": _SURE * size, "peak_memory_bytes": _SURE * size}
    read = shape.read_per_token(steps)
    if probe is not None and read is not None:
        found["token_p50_ms"] = 1e3 * read / (_FASTER * probe.bandwidth_bytes_per_s.most)
    return found
