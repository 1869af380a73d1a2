import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmopt import platform
from lmopt.backends.onnxruntime import rooms
from lmopt.backends.onnxruntime.rooms import Room, room_bytes
from lmopt.errors import InsufficientMemoryError
from lmopt.signature import StateTensor
from lmopt.types import BATCH, PAST, TensorSpec

TENSORS = tuple(
    StateTensor.of(TensorSpec(f"past_key_values.0.{side}", dtype, (BATCH, heads, PAST, 3)))
    for side, dtype, heads in (("key", "float32", 2), ("value", "float16", 1))
)


def filled(places=5, capacity=4):
    room = Room(TENSORS, places, capacity)
    for array in room.arrays:
        array[...] = np.arange(places).reshape(-1, 1, 1, 1) + 1
    return room


@given(st.lists(st.integers(0, 4), min_size=5, max_size=5))
@settings(deadline=None)
def test_any_rearrangement_is_done_at_once(sources):
    room = filled()
    room.rearrange(dict(enumerate(sources)), dict.fromkeys(range(5), 4))
    for array in room.arrays:
        assert array[:, 0, 0, 0].tolist() == [source + 1 for source in sources]
        assert (array == array[:, :1, :1, :1]).all()


def test_only_what_a_place_holds_is_copied():
    room = filled()
    room.rearrange({0: 3}, {3: 2})
    for array in room.arrays:
        assert (array[0, :, :2] == 4).all()
        assert (array[0, :, 2:] == 1).all()


def test_rows_that_stay_are_not_copied(monkeypatch):
    taken = []
    monkeypatch.setattr(
        Room, "take", lambda self, place, other, source, tokens: taken.append((place, source))
    )
    filled().rearrange({0: 0, 1: 1, 2: 4}, dict.fromkeys(range(5), 4))
    assert taken == [(2, 4)]


def test_arrays_start_at_a_cache_line_and_are_zero():
    for array in Room(TENSORS, 3, 7).arrays:
        assert array.ctypes.data % 64 == 0
        assert not array.any()
        assert array.flags.c_contiguous


def test_more_than_is_free_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(rooms, "memory_available_bytes", lambda: 100 << 20)
    monkeypatch.setattr(rooms, "_aligned_zeros", lambda *_: pytest.fail("allocated"))
    assert room_bytes(TENSORS, 1, 1) == 2 * 3 * 4 + 3 * 2
    with pytest.raises(
        InsufficientMemoryError, match=r"100 rows of 100000 tokens needs 286 MiB .*; 100 MiB are free"
    ):
        Room(TENSORS, 100, 100_000)
    with pytest.raises(MemoryError, match="smaller batch"):
        Room(TENSORS, 100, 100_000)


def test_where_the_system_does_not_say_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(rooms, "memory_available_bytes", lambda: None)
    assert Room(TENSORS, 1, 1_000_000).capacity == 1_000_000
    assert platform.memory_available_bytes() != 0
