"""Pieces of text: put together they are the text, and none has to be taken back."""

import itertools
import threading

import pytest
from generation_fakes import ByteTokenizer, HashEngine, ScriptEngine
from generation_hf import byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from lmopt.errors import TokenizerError, UnsupportedOptionError
from lmopt.generation import GenerationConfig, generate, stream
from lmopt.generation.streaming import IncrementalText

BYTES = [bytes([n]) for n in range(256)]
PLAIN = ByteTokenizer([*BYTES, "<s>", "</s>", b"ab", "…".encode(), "日本".encode(), " 😀".encode()])


def sentencepiece_tokenizer():
    """Llama 2's kind: spaces as U+2581, the first one dropped, unknown characters as byte tokens."""
    from generation_hf import Plain

    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        "▁",
        "▁the",
        "▁a",
        "x",
        "yz",
        "▁▁",
    ]
    backend = Backend(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Plain(backend), len(tokens)


def run(engine, prompt, config, tokenizer):
    """Pieces and result of a stream."""
    pieces, generator = [], stream(engine, prompt, config, tokenizer=tokenizer)
    while True:
        try:
            pieces.append(next(generator))
        except StopIteration as end:
            return pieces, end.value


def check(tokenizer, vocab_size, ids, **options):
    """A stream of a script: its pieces make the text that `generate` gives."""
    config = GenerationConfig(max_new_tokens=len(ids), **options)
    script = ScriptEngine(vocab_size=vocab_size, script=ids)
    pieces, result = run(script, [0], config, tokenizer)
    assert "".join(pieces) == result.text
    assert all(pieces)
    ((expected,),) = generate(script, [[0]], config, tokenizer=tokenizer)
    assert result == expected
    if not options:
        assert result.text == tokenizer.decode(ids)
    return pieces


@given(st.lists(st.integers(0, 261), min_size=1, max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_bytes(ids):
    check(PLAIN, 262, ids)


@given(st.text(min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_byte_by_byte(text):
    pieces = check(PLAIN, 262, list(text.encode()))
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert pieces == list(text)  # each character as soon as it is complete


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_real_decoders(data):
    tokenizer, size = data.draw(st.sampled_from([sentencepiece_tokenizer(), (byte_level_tokenizer()[1], 61)]))
    # Few kinds of token, so that runs of bytes and split characters are frequent.
    some = (
        [1, 2, 3 + 0xE4, 3 + 0xB8, 3 + 0xAD, 3 + 0x41, *range(size - 6, size)] if size > 100 else range(size)
    )
    ids = data.draw(st.lists(st.sampled_from([n for n in some if n < size]), min_size=1, max_size=50))
    check(tokenizer, size, ids)


@given(st.lists(st.sampled_from([*b"abc", 256, 258, 0xE2, 0x80, 0xA6, 259]), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_with_stop_strings(ids):
    for strings in (["abc"], ["ab", "bcc"], ["…"], ["c…a"], ["b<s>", "c<s>c"], ["aaaa"]):
        pieces = check(PLAIN, 262, ids, stop_strings=strings)
        if 256 not in ids:  # a special token between parts it, as in transformers, but is not seen
            assert not any(string in "".join(pieces) for string in strings)


def test_a_possible_stop_string_waits_and_is_then_given():
    engine = ScriptEngine(vocab_size=262, script=list(b"xabyabc."))
    config = GenerationConfig(max_new_tokens=8, stop_strings=["abc"])
    assert run(engine, [0], config, PLAIN)[0] == ["x", "aby"]
    config = config.with_options(stop_strings=["abq"])
    assert run(engine, [0], config, PLAIN)[0] == ["x", "aby", "abc", "."]


def test_text_comes_with_its_token():
    generator = stream(
        ScriptEngine(vocab_size=262, script=[258] * 40),
        [0],
        GenerationConfig(max_new_tokens=40),
        tokenizer=PLAIN,
    )
    assert list(generator) == ["ab"] * 40


@pytest.mark.parametrize("token", [ord("a"), 0xFF, 0xE2, 258, 256])
def test_work_per_token_does_not_grow(token):
    tokenizer = ByteTokenizer(PLAIN.tokens)
    text = IncrementalText(tokenizer)
    pieces = [text.push(token) for _ in range(3000)]
    assert tokenizer.decoded < 3000 * 20
    assert "".join(pieces) + text.finish() == tokenizer.decode([token] * 3000)


def test_equals_generate_when_sampling():
    config = GenerationConfig(max_new_tokens=30, do_sample=True, seed=4, eos_token_id=257)
    engine = HashEngine(vocab_size=262)
    assert run(engine, [5, 6], config, PLAIN)[1] == generate(engine, [[5, 6]], config, tokenizer=PLAIN)[0][0]


def test_closing_ends_the_work():
    engine = HashEngine(vocab_size=262)
    generator = stream(engine, [1], GenerationConfig(max_new_tokens=100), tokenizer=PLAIN)
    for _ in itertools.islice(generator, 3):
        pass
    calls = len(engine.calls)
    generator.close()
    assert len(engine.calls) == calls < 20


def test_cancel_gives_what_is_there():
    event = threading.Event()
    generator = stream(
        ScriptEngine(vocab_size=262, script=[97, 98, 0xE2, 99]), [0], GenerationConfig(max_new_tokens=4),
        tokenizer=PLAIN, cancel=event,
    )  # fmt: skip
    assert [next(generator), next(generator)] == ["a", "b"]
    event.set()
    with pytest.raises(StopIteration) as end:
        next(generator)
    assert (end.value.value.text, end.value.value.finish_reason) == ("ab", "cancelled")


def test_errors_come_at_the_call():
    with pytest.raises(UnsupportedOptionError, match="num_beams=2"):
        stream(HashEngine(), [1], GenerationConfig(num_beams=2), tokenizer=PLAIN)
    with pytest.raises(TokenizerError):
        stream(HashEngine(), [1], tokenizer=None)


def test_a_decoder_that_rewrites_cannot_make_pieces_disagree_with_the_text():
    class Cleaning(ByteTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            return super().decode(ids, skip_special_tokens).replace(" n't", "n't")

    tokenizer = Cleaning(BYTES)
    ids = list(b"do n't go")
    pieces, result = run(
        ScriptEngine(vocab_size=256, script=ids), [0], GenerationConfig(max_new_tokens=len(ids)), tokenizer
    )
    assert "".join(pieces) == result.text
