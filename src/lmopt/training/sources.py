"""Which tokens each step reads: pure functions of the step, so that resuming needs no state."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lmopt.errors import InputError
from lmopt.training.data import Corpus
from lmopt.training.objective import IGNORE
from lmopt.types import IntArray


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a step, on the host; see `lmopt.training.objective.Batch`.

    Attributes:
        input_ids: `(rows, length)` int64.
        labels: `(rows, length)` int64, or `IGNORE`.
        blocks: `(rows,)` int64.
    """

    input_ids: IntArray
    labels: IntArray
    blocks: IntArray


class Source(Protocol):
    """Where batches come from. A step reads the same rows however they are spread over processes."""

    @property
    def blocks(self) -> int:
        """Rows of one pass over the data."""
        ...

    def rows(self, step: int, first: int, last: int) -> Rows:
        """Give rows `first .. last - 1` of a step. A pure function; each row has a label to learn."""
        ...

    def begins(self, step: int) -> bool:
        """Whether rows of this step begin from an empty state instead of going on from the step before."""
        ...

    def describe(self) -> dict[str, Any]:
        """Say by plain data what is read, so that a checkpoint is resumed on the same data only."""
        ...


class ShuffledBlocks:
    """Blocks of the corpus in an order that a seed decides, anew in each epoch.

    Block `i` predicts tokens `i * length + 1 .. (i + 1) * length`, each from all tokens of the block before it:
    in an epoch every token but the corpus' first is learnt exactly once. The last block may be shorter.
    Documents of one block see each other, as usual in pre-training. An epoch's end does not cut a step: it is
    filled with the first blocks of the next epoch.

    Args:
        corpus: The text.
        length: Tokens that a row predicts.
        rows_per_step: Rows of a step, over all processes and accumulation.
        seed: Decides the order.
    """

    def __init__(self, corpus: Corpus, length: int, rows_per_step: int, seed: int) -> None:
        self._corpus, self._length, self._rows, self._seed = corpus, length, rows_per_step, seed
        self.blocks = -(-(corpus.ids.size - 1) // length)
        self._orders: dict[int, IntArray] = {}

    def rows(self, step: int, first: int, last: int) -> Rows:
        """Give rows `first .. last - 1` of a step."""
        places = np.arange(step * self._rows + first, step * self._rows + last)
        epochs = places // self.blocks
        blocks = np.array(
            [
                self._order(int(epoch))[place]
                for epoch, place in zip(epochs, places % self.blocks, strict=True)
            ]
        )
        return _cut(self._corpus, blocks * self._length, blocks, self._length, self._corpus.ids.size - 1)

    def begins(self, step: int) -> bool:
        """Blocks are strangers to each other."""
        return True

    def describe(self) -> dict[str, Any]:
        """Name corpus and order."""
        return {"source": "blocks", "corpus": self._corpus.fingerprint, "length": self._length}

    def _order(self, epoch: int) -> IntArray:
        if epoch not in self._orders:
            # A step touches two epochs at most, unless the corpus is smaller than a step.
            if len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = np.random.default_rng((self._seed, epoch)).permutation(self.blocks)
        return self._orders[epoch]


class ContiguousStreams:
    """The corpus in as many contiguous streams as a step has rows; each row goes on where it ended.

    Streams are of one length; where the corpus does not divide by their number, neighbours share a token, so
    that none is dropped. At the end of the streams all rows begin anew. There is no shuffling.

    Args:
        corpus: The text.
        length: Tokens that a row predicts in a step.
        rows_per_step: Number of streams.

    Raises:
        InputError: The corpus has fewer tokens than streams.
    """

    def __init__(self, corpus: Corpus, length: int, rows_per_step: int) -> None:
        targets = corpus.ids.size - 1
        if targets < rows_per_step:
            raise InputError(
                f"{corpus.ids.size} tokens do not fill {rows_per_step} streams; use fewer rows a step "
                "(per_device_train_batch_size, gradient_accumulation_steps, processes)"
            )
        self._corpus, self._length, self._rows = corpus, length, rows_per_step
        self._stream = -(-targets // rows_per_step)
        self._starts = np.linspace(0, targets - self._stream, rows_per_step).round().astype(np.int64)
        self.steps_per_epoch = -(-self._stream // length)
        self.blocks = self.steps_per_epoch * rows_per_step

    def rows(self, step: int, first: int, last: int) -> Rows:
        """Give rows `first .. last - 1` of a step."""
        place = step % self.steps_per_epoch
        starts = self._starts[first:last] + place * self._length
        blocks = np.arange(first, last, dtype=np.int64) * self.steps_per_epoch + place
        return _cut(self._corpus, starts, blocks, self._length, self._starts[first:last] + self._stream)

    def begins(self, step: int) -> bool:
        """Whether the streams begin (again)."""
        return step % self.steps_per_epoch == 0

    def describe(self) -> dict[str, Any]:
        """Name corpus and streams."""
        return {
            "source": "streams",
            "corpus": self._corpus.fingerprint,
            "length": self._length,
            "streams": self._rows,
        }


def _cut(corpus: Corpus, starts: IntArray, blocks: IntArray, length: int, ends: IntArray | int) -> Rows:
    """Cut rows out of the corpus; what would be read behind `ends`, the last token to predict, is ignored."""
    places = starts[:, None] + np.arange(length + 1)
    ids = corpus.ids[np.minimum(places, corpus.ids.size - 1)].astype(np.int64)
    labels = ids[:, 1:].copy()
    labels[places[:, 1:] > np.reshape(ends, (-1, 1))] = IGNORE
    return Rows(ids[:, :-1], labels, blocks)
