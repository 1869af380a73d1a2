"""Which calibration texts are read."""

import numpy as np
import pytest

from lmopt.compression import Calibration
from lmopt.compression.calibration import choose_rows
from lmopt.errors import InputError, UnsupportedOptionError


class Words:
    """A tokenizer whose ids are the words, which are numbers."""

    def encode(self, text):
        return [int(word) for word in text.split()]


def text(count, kinds=100):
    return " ".join(str(n % kinds) for n in range(count))


def test_rows_have_one_length_do_not_overlap_and_depend_on_the_seed_only():
    ids = np.arange(10_000)
    rows = choose_rows(ids, 8, 64, 3)
    assert [len(row) for row in rows] == [64] * 8
    flat = np.concatenate(rows)
    assert len(np.unique(flat)) == len(flat)
    assert all((np.diff(row) == 1).all() for row in rows)
    assert np.array_equal(flat, np.concatenate(choose_rows(ids, 8, 64, 3)))
    assert not np.array_equal(flat, np.concatenate(choose_rows(ids, 8, 64, 4)))


def test_short_texts_give_fewer_rows():
    assert len(Calibration([text(700)], rows=128, row_tokens=100).cut(Words(), None)) == 7


def test_texts_are_joined_and_cut_to_the_context():
    rows = Calibration([text(200), text(200)], rows=4, row_tokens=512).cut(Words(), 50)
    assert [len(row) for row in rows] == [50] * 4


def test_a_path_is_read_and_a_string_is_a_path(tmp_path):
    (tmp_path / "book.txt").write_text("one text")
    for given in (tmp_path / "book.txt", str(tmp_path / "book.txt")):
        assert Calibration.of(given).texts == ("one text",)
    with pytest.raises(InputError, match="a text, and no path"):
        Calibration.of("a text, and no path")
    with pytest.raises(UnsupportedOptionError, match="list of texts"):
        Calibration("a text")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="no text file"):
        Calibration.of(tmp_path / "bytes")


@pytest.mark.parametrize(
    ("texts", "told"), [([], "hold 0"), ([text(100)], "hold 100"), ([text(900, 3)], "hold 3 diff")]
)
def test_texts_that_say_too_little_are_refused(texts, told):
    with pytest.raises(InputError, match=told):
        Calibration(texts, row_tokens=64).cut(Words(), None)


@pytest.mark.parametrize("options", [{"rows": 0}, {"row_tokens": 8}, {"rows": 2.5}])
def test_sizes_are_checked(options):
    with pytest.raises(UnsupportedOptionError, match="expected"):
        Calibration([], **options)
