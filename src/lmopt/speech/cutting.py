"""Cut sound that is longer than an encoder takes where it is quietest."""

import numpy as np
from numpy.typing import NDArray

_FRAME_S = 0.02
_QUIET_S = 0.2
_LAST = 1 / 3  # share of a piece in which its end is looked for


def cut(samples: NDArray[np.floating], most: int, sampling_rate: int) -> list[NDArray[np.floating]]:
    """Cut one sound into pieces that an encoder takes.

    Each piece ends in the middle of the quietest 0.2 s of the last third of the longest that it may be: a word is
    cut only where nobody pauses for so long. The loudness of a stretch is the mean of its squares.

    Args:
        samples: `(samples,)` floats.
        most: Samples that a piece may have.
        sampling_rate: Samples a second.

    Returns:
        The pieces in order; together they are the sound.
    """
    frame = max(1, round(_FRAME_S * sampling_rate))
    width = round(_QUIET_S / _FRAME_S)
    pieces = []
    while samples.size > most:
        first = int(most * (1 - _LAST))
        frames = (most - first) // frame
        loudness = (
            np.square(samples[first : first + frames * frame].astype(np.float64)).reshape(frames, -1).mean(1)
        )
        stretch = np.convolve(loudness, np.full(min(width, frames), 1.0), mode="valid")
        end = first + round((int(stretch.argmin()) + min(width, frames) / 2) * frame)
        pieces.append(samples[:end])
        samples = samples[end:]
    return [*pieces, samples]
