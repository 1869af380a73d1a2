"""Where the reference's logits wait while the candidate is in memory."""

import tempfile
import weakref

import numpy as np

from lmopt.artifact import require_space
from lmopt.types import FloatArray


class Shelf:
    """Keeps rows of logits in a file without a name, which goes with the object.

    With a large vocabulary the logits of a gate take as much memory as a small model, and they are needed a few
    positions at a time.

    Args:
        positions: Positions of all rows together.
        vocab_size: Width of the logits.

    Raises:
        DiskFullError: The system's folder for temporary files cannot hold them.
    """

    def __init__(self, positions: int, vocab_size: int) -> None:
        require_space(tempfile.gettempdir(), 4 * positions * vocab_size)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object
        self._starts: dict[int, int] = {}
        self._width = vocab_size
        weakref.finalize(self, self._file.close)

    def put(self, row: int, logits: FloatArray) -> None:
        """Put the logits of a row away.

        Args:
            row: Number to find it by.
            logits: `(sequence, vocab_size)` float32.
        """
        self._starts[row] = self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(logits, np.float32).data)

    def read(self, row: int, start: int, positions: int) -> FloatArray:
        """Read some positions of a row as `(positions, vocab_size)` float32.

        Args:
            row: A number given to `put`.
            start: First position.
            positions: How many.
        """
        place = self._starts[row] + 4 * start * self._width
        self._file.seek(place)
        count = positions * self._width
        flat: FloatArray = np.frombuffer(self._file.read(4 * count), np.float32, count)
        return flat.reshape(positions, self._width)
