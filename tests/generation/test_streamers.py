"""transformers' own streamers show what is generated, as they do there."""

import threading

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from lmopt.errors import EngineError, UnsupportedOptionError
from lmopt.model import Model
from lmopt.runtime import Runtime
from lmopt.testing.models import tiny_llama


class Recorder:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


@pytest.fixture(scope="module")
def runtime():
    with Runtime(Model.from_module(tiny_llama()), backend="torch") as runtime:
        yield runtime


def words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_what_transformers_puts_is_put(runtime):
    module = tiny_llama()
    theirs, ours, tokens = Recorder(), Recorder(), []
    prompt = [5, 17, 40]
    how = {"max_new_tokens": 7, "do_sample": False}
    module.generate(torch.tensor([prompt]), streamer=theirs, pad_token_id=0, **how)
    found = runtime.generate(prompt, streamer=ours, on_token=tokens.append, **how)
    assert [value.shape for value in ours.values] == [tuple(value.shape) for value in theirs.values]
    assert [value.tolist() for value in ours.values] == [value.tolist() for value in theirs.values]
    assert ours.ended == theirs.ended == 1
    assert [token.token_id for token in tokens] == found.token_ids


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_their_text_streamers(runtime, skip_prompt, capsys):
    tokenizer = words()
    found = runtime.generate(
        [5, 17, 40], streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt), max_new_tokens=7
    )
    ids = found.token_ids if skip_prompt else [5, 17, 40, *found.token_ids]
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=20)
    thread = threading.Thread(
        target=runtime.generate, args=([5, 17, 40],), kwargs={"streamer": iterator, "max_new_tokens": 7}
    )
    thread.start()
    assert "".join(iterator) == tokenizer.decode(ids)
    thread.join()


def test_what_a_streamer_cannot_show(runtime):
    for prompt, options in (
        ([[5], [6]], {}),
        ([5], {"num_beams": 2}),
        ([5], {"num_return_sequences": 2, "do_sample": True}),
    ):
        streamer = Recorder()
        with pytest.raises(UnsupportedOptionError, match="a streamer shows one sequence"):
            runtime.generate(prompt, streamer=streamer, max_new_tokens=2, **options)
        assert not streamer.values


def test_nobody_waits_for_a_request_that_failed(runtime, monkeypatch):
    def fail(*arguments, **options):
        raise EngineError("broken")

    monkeypatch.setattr(runtime.engine, "forward", fail)
    streamer = Recorder()
    with pytest.raises(EngineError, match="broken"):
        runtime.generate([5], streamer=streamer, max_new_tokens=2)
    assert streamer.ended == 1
    assert np.array_equal(streamer.values[0], [[5]])
