"""Long sound is cut where it is quiet."""

import numpy as np
import pytest

from lmopt.errors import DtypeError
from lmopt.speech import LogMel
from lmopt.speech.cutting import cut

RATE = 1000


def loud(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=round(seconds * RATE)).astype(np.float32)


def test_pieces_end_in_the_pause_and_lose_nothing() -> None:
    pause = np.zeros(300, np.float32)
    sound = np.concatenate([loud(8), pause, loud(8), pause, loud(2)])
    pieces = cut(sound, 10 * RATE, RATE)
    np.testing.assert_array_equal(np.concatenate(pieces), sound)
    ends = np.cumsum([one.size for one in pieces])[:-1]
    assert all(any(abs(end - middle) <= 60 for middle in (8150, 16450)) for end in ends)
    assert len(pieces) == 3


@pytest.mark.parametrize("seconds", [9.99, 10, 10.01, 37.3])
def test_pieces_fit_where_nobody_pauses(seconds: float) -> None:
    sound = loud(seconds)
    pieces = cut(sound, 10 * RATE, RATE)
    np.testing.assert_array_equal(np.concatenate(pieces), sound)
    assert all(0 < one.size <= 10 * RATE for one in pieces)
    assert all(one.size >= 6.6 * RATE for one in pieces[:-1])


def test_features_of_pieces_are_those_of_the_parts() -> None:
    hear = LogMel(8, 100)  # one second
    sound = np.random.default_rng(1).normal(size=40_000).astype(np.float32)
    parts = cut(sound, 16_000, 16_000)
    for found, part in zip(hear.pieces(sound), parts, strict=True):
        np.testing.assert_array_equal(found, hear(part))
    assert len(parts) > 2
    (whole,) = hear.pieces(sound[:16_000])
    np.testing.assert_array_equal(whole, hear(sound[:16_000]))
    with pytest.raises(DtypeError, match="expected floats"):
        hear.pieces(np.zeros(50_000, np.int16))
