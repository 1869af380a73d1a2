"""Row 25: cancelling, deadlines and signals end work within one call of the engine and return memory."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from memory_watch import resident

from lmopt.generation import GenerationConfig, generate

pytestmark = pytest.mark.slow
MIB = 2**20


class Counted:
    """An engine whose calls are counted."""

    def __init__(self, engine):
        self._engine = engine
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def forward(self, *arguments, **options):
        self.calls += 1
        return self._engine.forward(*arguments, **options)


def test_cancels_at_random_tokens(runtime, full_sweep):
    generator = np.random.default_rng(3)
    config = GenerationConfig(max_new_tokens=60)
    prompts = [generator.integers(3, 90, length).tolist() for length in (3, 17, 30)]
    whole = [found[0] for found in generate(runtime.engine, prompts, config)]
    before = None
    for number in range(100 if full_sweep else 12):
        engine, event = Counted(runtime.engine), threading.Event()
        after, at = int(generator.integers(1, 60)), []

        def on_token(token, engine=engine, event=event, after=after, at=at):
            at.append(token)
            if len([one for one in at if one.prompt == 1]) == after and not event.is_set():
                event.set()
                engine.calls = 0

        # One prompt of three is cancelled: the others do not notice.
        found = generate(
            engine, prompts, config, cancel=[None, event, None], on_token=on_token
        ) if number % 2 else generate(engine, prompts, config, cancel=event, on_token=on_token)  # fmt: skip
        for place, (one,) in enumerate(found):
            if place == 1 or number % 2 == 0:
                assert one.token_ids == whole[place].token_ids[: len(one.token_ids)]
                assert len(one.token_ids) == after
                assert one.finish_reason in ("cancelled", "length")
            else:
                assert one == whole[place]
        if number % 2 == 0:
            assert engine.calls == 0
        if number == 3:
            before = resident()
    assert resident() - before < 5 * MIB


def test_abandoned_streams_stop_and_return_their_memory(runtime, full_sweep):
    tokens = runtime.generate([5, 6, 7], max_new_tokens=60, eos_token_id=None).token_ids
    before = None
    for number in range(100 if full_sweep else 15):
        seen = []

        def on_token(token, seen=seen, number=number):
            seen.append(token.token_id)
            if len(seen) == 1 + number % 50:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            runtime.generate([5, 6, 7], max_new_tokens=60, eos_token_id=None, on_token=on_token)
        assert seen == tokens[: len(seen)]
        if number == 4:
            before = resident()
    assert resident() - before < 5 * MIB
    assert runtime.generate([5, 6, 7], max_new_tokens=60, eos_token_id=None).token_ids == tokens


def test_a_deadline_returns_what_is_there(runtime):
    whole = runtime.generate([5, 6, 7], max_new_tokens=100, eos_token_id=None)
    found = runtime.generate([5, 6, 7], max_new_tokens=100, eos_token_id=None, max_time=1e-6)
    assert found.finish_reason == "time"
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert len(found.token_ids) < 100
    found = runtime.generate([5, 6, 7], max_new_tokens=100, eos_token_id=None, max_time=3600.0)
    assert found == whole


PROGRAM = """
    import contextlib, sys
    # torch imports it as Python ends, where it is installed. Its first import makes named tuples, whose `eval` lets
    # CPython forget that an interrupt went unhandled, and the status would be 1.
    with contextlib.suppress(ImportError):
        import tabulate
    from lmopt.model import Model
    from lmopt.runtime import Runtime
    from lmopt.testing.models import tiny_llama

    with Runtime(Model.from_module(tiny_llama()), backend=sys.argv[1], threads=1) as runtime:
        tell = iter([lambda: print("ready", flush=True)])
        try:
            while True:
                runtime.generate(
                    [5, 6, 7], max_new_tokens=100, eos_token_id=None, on_token=lambda _: next(tell, bool)()
                )
        except KeyboardInterrupt:
            print(len(runtime.generate([5], max_new_tokens=3, eos_token_id=None).token_ids), flush=True)
            raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_and_leaves_it_usable(runtime, number):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), runtime.backend],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # pytest may have been started with SIGINT ignored, which a child would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
        child.wait()
    if number == signal.SIGINT:
        assert out == "3\n", err
        assert "KeyboardInterrupt" in err
    assert child.returncode in (-number, 128 + number)
