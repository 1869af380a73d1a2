"""Places inside torch are taken by one thread at a time, and given back."""

import threading
from types import SimpleNamespace

import pytest

from lmopt.backends.torch.registering import known_operators, replacing


def test_what_was_there_is_there_again() -> None:
    owner = SimpleNamespace(place=3)

    def fail() -> None:
        with replacing(owner, "place", lambda before: before + 1):
            assert owner.place == 4
            with replacing(owner, "place", lambda before: before * 10):
                assert owner.place == 40
            assert owner.place == 4
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert owner.place == 3
    with replacing(owner, "moved", lambda before: 1):
        assert vars(owner) == {"place": 3}


def test_threads_take_turns() -> None:
    """Each finds what torch has, not what another has put there for a moment."""
    owner = SimpleNamespace(place=())
    seen = []

    def work(number: int) -> None:
        for _ in range(50):
            with replacing(owner, "place", lambda before: (*before, number)):
                seen.append(owner.place == (number,))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(seen) == 200
    assert all(seen)
    assert owner.place == ()


def test_tables_can_be_read_in_two_threads_at_once() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    inside, go_on, found = threading.Event(), threading.Event(), []

    def first() -> None:
        with known_operators():
            inside.set()
            go_on.wait(10)
            found.append(len(ONNXRegistry.from_torchlib().functions))

    def second() -> None:
        inside.wait(10)
        go_on.set()
        with known_operators():
            found.append(len(ONNXRegistry.from_torchlib().functions))

    threads = [threading.Thread(target=one) for one in (first, second)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 2
    assert found[0] == found[1] > 100
