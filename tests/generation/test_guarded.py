"""An engine is closed once, after the last call has left it, and every later call says so."""

import threading

import numpy as np
import pytest
from generation_fakes import HashEngine, RewindEngine

from lmopt.contracts import Engine, SupportsRewind
from lmopt.errors import ClosedError
from lmopt.generation import GenerationConfig, generate
from lmopt.generation.guarded import GuardedEngine
from lmopt.generation.prefixes import rewinds


class Closing(RewindEngine):
    """Counts closings, notices a close under a running call, and can be held inside `forward`."""

    def __init__(self):
        super().__init__()
        self.closed = 0
        self.busy = 0
        self.entered, self.leave = threading.Event(), threading.Event()
        self.leave.set()

    def forward(self, *arguments, **options):
        assert not self.closed
        self.busy += 1
        self.entered.set()
        self.leave.wait(10)
        found = super().forward(*arguments, **options)
        assert not self.closed
        self.busy -= 1
        return found

    def close(self):
        assert self.busy == 0
        self.closed += 1


def test_it_is_an_engine_with_the_abilities_of_the_inner_one():
    guarded = GuardedEngine(HashEngine(), "m")
    assert isinstance(guarded, Engine)
    assert isinstance(guarded, SupportsRewind)
    assert not rewinds(guarded)
    assert rewinds(GuardedEngine(RewindEngine(), "m"))
    inner = RewindEngine()
    config = GenerationConfig(max_new_tokens=5)
    assert generate(GuardedEngine(inner, "m"), [[1], [2, 3]], config) == generate(
        HashEngine(), [[1], [2, 3]], config
    )
    guarded = GuardedEngine(inner, "m")
    assert (guarded.inner, guarded.facts, guarded.ragged) == (inner, inner.facts, True)
    assert guarded.report() == inner.report()


def test_after_close_every_call_says_so():
    inner = Closing()
    guarded = GuardedEngine(inner, "a/model")
    state = guarded.begin(1)
    guarded.close()
    guarded.close()
    assert inner.closed == 1
    one = np.ones(1, np.int64)
    for call in (
        lambda: guarded.begin(1),
        lambda: guarded.forward(one[None], one, state),
        lambda: guarded.select(state, one),
        lambda: guarded.join([state]),
        lambda: guarded.rewind(state, one),
        lambda: guarded.copy(state),
        guarded.report,
        guarded.opened,
        lambda: guarded.inner,
    ):
        with pytest.raises(ClosedError, match="a/model is closed; open a new"):
            call()


def test_a_call_that_is_inside_finishes_and_closes():
    inner = Closing()
    inner.leave.clear()
    guarded = GuardedEngine(inner, "m")
    found = []

    def work():
        try:
            generate(guarded, [[1]], GenerationConfig(max_new_tokens=50))
        except ClosedError as error:
            found.append(str(error))  # the error itself would hold the frames, and they the state

    thread = threading.Thread(target=work)
    thread.start()
    assert inner.entered.wait(10)
    guarded.close()  # does not wait
    assert inner.closed == 0
    inner.leave.set()
    thread.join(10)
    assert inner.closed == 1
    assert len(found) == 1
    assert len(inner.calls) == 1
    assert not inner.alive


def test_an_error_inside_leaves_nobody_inside():
    class Breaks(Closing):
        def forward(self, *arguments, **options):
            raise MemoryError

    inner = Breaks()
    guarded = GuardedEngine(inner, "m")
    with pytest.raises(MemoryError):
        generate(guarded, [[1]])
    guarded.close()
    assert inner.closed == 1


def test_a_callback_may_close():
    inner = Closing()
    guarded = GuardedEngine(inner, "m")
    with pytest.raises(ClosedError):
        generate(guarded, [[1]], GenerationConfig(max_new_tokens=9), on_token=lambda token: guarded.close())
    assert inner.closed == 1
