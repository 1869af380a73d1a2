"""Frames and failures between processes; deaths are tested where children are used (scaling, tensor parallelism)."""

import os
from typing import Any

import numpy as np
import pytest

from lmopt.children import Channel, as_failure, from_failure
from lmopt.errors import EngineError, InputError


def test_frames_come_as_they_went_and_half_a_frame_is_none() -> None:
    source, target = os.pipe()
    channel = Channel(source, target)
    arrays: list[Any] = [
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.zeros((0, 4), np.float32),
        np.float32(2.5),
    ]
    channel.send({"do": "it", "text": "ü\n"}, arrays)
    frame = channel.receive()
    assert frame is not None
    header, found = frame
    assert header == {"do": "it", "text": "ü\n"}
    for mine, wanted in zip(found, arrays, strict=True):
        assert mine.dtype == wanted.dtype
        np.testing.assert_array_equal(mine.reshape(wanted.shape), wanted)
    channel.send({"do": "it"})
    whole = os.read(source, 1000)
    os.write(target, whole[:-3])
    os.close(target)
    assert channel.receive() is None
    os.close(source)


def test_failures_keep_their_type_where_it_is_ours(capfd: pytest.CaptureFixture[str]) -> None:
    ours = from_failure(as_failure(InputError("too long")))
    assert (type(ours), str(ours)) == (InputError, "too long")
    assert capfd.readouterr().err == ""
    for strange in (ZeroDivisionError("by 0"), OSError("gone")):
        found = from_failure(as_failure(strange))
        assert type(found) is EngineError
        assert f"{type(strange).__name__}: {strange}" in str(found)
        assert f"{type(strange).__name__}: {strange}" in capfd.readouterr().err
