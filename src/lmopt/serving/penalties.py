"""Penalties and biases of OpenAI's API, which transformers does not have."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from lmopt.generation.history import History
from lmopt.generation.processors import Processor
from lmopt.types import FloatArray, IntArray


class OutputPenalty:
    """Lower the scores of tokens that the row has generated already; prompts do not count.

    `score -= count * frequency + (count > 0) * presence`, as OpenAI's API reference states it.

    Args:
        frequency: For each time that the token occurred.
        presence: Once, if it occurred.
    """

    only_bans: ClassVar[bool] = False

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency = np.float32(frequency)
        self._presence = np.float32(presence)

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Lower the scores."""
        tokens, counts = np.unique(history.new, return_counts=True)
        scores[tokens] -= counts.astype(np.float32) * self._frequency + self._presence


class Bias:
    """Add a number to the scores of some tokens.

    Args:
        ids: `(n,)` int64 token ids.
        biases: `(n,)` float32.
    """

    only_bans: ClassVar[bool] = False

    def __init__(self, ids: IntArray, biases: FloatArray) -> None:
        self._ids = ids
        self._biases = biases

    def __call__(self, scores: FloatArray, history: History) -> None:
        """Add the numbers."""
        scores[self._ids] += self._biases


def penalties(frequency: float, presence: float, bias: Mapping[int, float]) -> tuple[Processor, ...]:
    """List what a request asks for; often nothing."""
    found: list[Processor] = []
    if bias:
        found.append(Bias(np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32)))
    if frequency or presence:
        found.append(OutputPenalty(frequency, presence))
    return tuple(found)
