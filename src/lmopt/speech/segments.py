"""Read what a Whisper model has written between tokens of time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

# One token of time after another stands for so much more sound.
_STEP_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech.

    Attributes:
        start_s: Where it begins in the sound, in seconds.
        end_s: Where it ends.
        text: What is said.
    """

    start_s: float
    end_s: float
    text: str


def segments(
    token_ids: Sequence[int],
    decode: Callable[[list[int]], str],
    *,
    first_time: int,
    offset_s: float = 0.0,
    length_s: float,
) -> list[Segment]:
    """Turn tokens into stretches of speech.

    Args:
        token_ids: What the model has written.
        decode: Turns ids of text into text.
        first_time: Token of 0.00 s; those after it are 0.02 s apart.
        offset_s: Where the piece of sound that the model has heard begins in the whole, in seconds.
        length_s: How long that piece is: the end of text after which no time stands.

    Returns:
        The stretches in order; those without text are left out.
    """
    found = []
    start, words = 0.0, list[int]()

    def close(end: float) -> None:
        if text := decode(words).strip():
            found.append(Segment(round(offset_s + start, 2), round(offset_s + end, 2), text))
        words.clear()

    for token in token_ids:
        if token < first_time:
            words.append(token)
            continue
        # The model hears silence behind the end, and may write times there.
        time = min((token - first_time) * _STEP_S, length_s)
        close(time)
        start = time
    close(length_s)
    return found
