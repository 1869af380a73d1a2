"""Every token is learnt, in an order that the step and the seed alone decide."""

import numpy as np
import pytest

from lmopt.errors import InputError
from lmopt.training.data import Corpus
from lmopt.training.objective import IGNORE
from lmopt.training.sources import ContiguousStreams, ShuffledBlocks


def corpus(tokens: int) -> Corpus:
    """Ids that are their own places."""
    return Corpus(np.arange(tokens, dtype=np.int32), 1)


@pytest.mark.parametrize(("tokens", "length"), [(33, 8), (34, 8), (40, 8), (41, 8), (5, 8), (2, 8), (50, 1)])
def test_an_epoch_of_blocks_learns_every_token_once(tokens: int, length: int) -> None:
    source = ShuffledBlocks(corpus(tokens), length, 1, seed=3)
    learnt: list[int] = []
    for step in range(source.blocks):
        found = source.rows(step, 0, 1)
        kept = found.labels[0] != IGNORE
        assert kept.any()
        # A label is the token behind its input.
        assert (found.labels[0][kept] == found.input_ids[0][kept] + 1).all()
        assert found.input_ids.shape == (1, length)
        assert found.input_ids[0, 0] == found.blocks[0] * length
        learnt += found.labels[0][kept].tolist()
    assert sorted(learnt) == list(range(1, tokens))


def test_the_order_is_another_each_epoch_and_with_each_seed_but_always_the_same() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        source = ShuffledBlocks(corpus(801), 8, 10, seed)
        return [
            int(one) for step in range(epoch * 10, epoch * 10 + 10) for one in source.rows(step, 0, 10).blocks
        ]

    first, second, other = order(0, 0), order(0, 1), order(1, 0)
    assert sorted(first) == sorted(second) == sorted(other) == list(range(100))
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(100))}) == 4
    assert order(0, 0) == first


def test_a_step_is_the_same_however_it_is_split() -> None:
    source = ShuffledBlocks(corpus(300), 8, 12, seed=0)
    for step in (0, 3, 7):  # one of them crosses the end of an epoch of 38 blocks
        whole = source.rows(step, 0, 12)
        parts = [source.rows(step, first, first + 3) for first in range(0, 12, 3)]
        assert (np.concatenate([one.labels for one in parts]) == whole.labels).all()
        assert (np.concatenate([one.blocks for one in parts]) == whole.blocks).all()


def test_a_corpus_smaller_than_a_step_is_read_again_within_it() -> None:
    found = ShuffledBlocks(corpus(17), 8, 6, seed=0).rows(0, 0, 6)
    assert sorted(found.blocks.tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("tokens", "streams"), [(97, 4), (98, 4), (99, 4), (100, 4), (50, 7), (9, 8), (9, 1)]
)
def test_streams_go_on_and_drop_nothing(tokens: int, streams: int) -> None:
    source = ContiguousStreams(corpus(tokens), 5, streams)
    rows = [source.rows(step, 0, streams) for step in range(source.steps_per_epoch)]
    assert [source.begins(step) for step in range(source.steps_per_epoch + 1)] == [
        step in (0, source.steps_per_epoch) for step in range(source.steps_per_epoch + 1)
    ]
    learnt: list[int] = []
    for stream in range(streams):
        labels = np.concatenate([one.labels[stream] for one in rows])
        kept = labels[labels != IGNORE]
        assert (np.diff(kept) == 1).all()
        assert (labels[: len(kept)] == kept).all()
        learnt += kept.tolist()
    assert set(learnt) == set(range(1, tokens))
    assert len(learnt) - (tokens - 1) < streams  # neighbours share a token at most
    assert all((one.labels != IGNORE).any(axis=1).all() for one in rows)
    again = source.rows(source.steps_per_epoch, 0, streams)
    assert (again.labels == rows[0].labels).all()


def test_too_many_streams_are_refused() -> None:
    with pytest.raises(InputError, match="do not fill 8 streams"):
        ContiguousStreams(corpus(8), 5, 8)
