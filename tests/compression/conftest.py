"""Inputs of linears, for methods that look at them."""

from collections.abc import Callable

import numpy as np
import pytest

from lmopt.compression.statistics import Statistics


@pytest.fixture
def correlated() -> Callable[..., Statistics]:
    """Make statistics of inputs that depend on each other and differ in size."""

    def make(columns: int, tokens: int = 400, seed: int = 0) -> Statistics:
        random = np.random.default_rng(seed)
        mixing = random.standard_normal((max(1, columns // 3), columns))
        inputs = random.standard_normal((tokens, len(mixing))) @ mixing
        inputs += 0.5 * random.standard_normal((tokens, columns))
        inputs *= np.exp(random.standard_normal(columns))
        return Statistics.of(inputs.astype(np.float32))

    return make
