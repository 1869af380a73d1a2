"""Tokens of time become stretches of speech."""

import pytest

from lmopt.speech import Segment, segments

FIRST = 100


def decode(ids: list[int]) -> str:
    return " ".join(f"w{one}" for one in ids if one != 99)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([100, 1, 2, 150, 99], [Segment(0.0, 1.0, "w1 w2")]),
        ([105, 1, 150, 150, 2, 200, 99], [Segment(0.1, 1.0, "w1"), Segment(1.0, 2.0, "w2")]),
        ([105, 1, 150, 160, 2, 200], [Segment(0.1, 1.0, "w1"), Segment(1.2, 2.0, "w2")]),
        # Cut off before the closing time: it ends with the sound.
        ([100, 1, 150, 150, 2], [Segment(0.0, 1.0, "w1"), Segment(1.0, 3.0, "w2")]),
        # Behind the end there is silence.
        ([120, 1, 300], [Segment(0.4, 3.0, "w1")]),
        ([300, 1], [Segment(3.0, 3.0, "w1")]),
        ([1, 2], [Segment(0.0, 3.0, "w1 w2")]),
        ([100, 150, 99], []),
        ([], []),
    ],
)
def test_tokens(tokens: list[int], expected: list[Segment]) -> None:
    assert segments(tokens, decode, first_time=FIRST, length_s=3.0) == expected


def test_a_later_piece_begins_later() -> None:
    found = segments([105, 1, 150], decode, first_time=FIRST, offset_s=27.5, length_s=3.0)
    assert found == [Segment(27.6, 28.5, "w1")]
