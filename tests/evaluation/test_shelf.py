"""Logits that wait in a file come back as they were."""

import numpy as np
import pytest

from lmopt.evaluation.shelf import Shelf


def test_positions_of_rows_come_back_in_any_order() -> None:
    rng = np.random.default_rng(0)
    rows = {
        number: rng.standard_normal((length, 11)).astype(np.float32)
        for number, length in ((4, 3), (0, 7), (9, 1))
    }
    shelf = Shelf(11, 11)
    for number, logits in rows.items():
        shelf.put(number, logits)
    for number in (0, 9, 4, 0):
        for start in range(len(rows[number])):
            found = shelf.read(number, start, len(rows[number]) - start)
            assert np.array_equal(found, rows[number][start:])


def test_what_is_not_contiguous_is_kept_too() -> None:
    logits = np.arange(24, dtype=np.float32).reshape(4, 6).T
    shelf = Shelf(6, 4)
    shelf.put(0, logits)
    assert np.array_equal(shelf.read(0, 0, 6), logits)


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_the_file_goes_with_the_shelf() -> None:
    shelf = Shelf(1, 2)
    shelf.put(0, np.zeros((1, 2), np.float32))
    file = shelf._file
    del shelf
    assert file.closed
