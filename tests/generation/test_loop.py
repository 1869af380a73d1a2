"""The loop: same alone as in a batch, rows leave when they are done, cancellation, errors."""

import threading

import numpy as np
import pytest
from generation_fakes import ByteTokenizer, HashEngine, ScriptEngine

from lmopt.errors import (
    ContextLengthError,
    DtypeError,
    EmptyPromptError,
    ShapeError,
    TokenIdError,
    TokenizerError,
    UnsupportedOptionError,
)
from lmopt.generation import GenerationConfig, generate

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [4]]
MODES = [
    {},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 3, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.2},
    {"do_sample": True, "seed": 3, "num_return_sequences": 3, "min_p": 0.01, "typical_p": 0.9},
    {"no_repeat_ngram_size": 1, "logprobs": 3},
    {"num_beams": 3, "num_return_sequences": 2, "logprobs": True},
]


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("mode", MODES, ids=repr)
def test_alone_equals_batch_bit_for_bit(mode, ragged):
    config = GenerationConfig(max_new_tokens=12, eos_token_id=[3, 30, 31], **mode)
    alone = [generate(HashEngine(ragged=ragged), [prompt], config)[0] for prompt in PROMPTS]
    assert generate(HashEngine(ragged=ragged), PROMPTS, config) == alone
    assert generate(HashEngine(ragged=ragged), PROMPTS[::-1], config) == alone[::-1]
    assert len({len(one.token_ids) for row in alone for one in row}) > 1


def test_seeds_belong_to_rows():
    config = GenerationConfig(max_new_tokens=9, do_sample=True, seed=[5, 6, 5])
    a, b, c = (row[0] for row in generate(HashEngine(), [[1], [1], [1]], config))
    assert a.token_ids == c.token_ids != b.token_ids
    assert (a.seed, b.seed) == (5, 6)
    again = generate(HashEngine(), [[9], [1]], config.with_options(seed=[5, 6]))[1][0]
    assert again == b


def test_sequences_of_one_prompt_differ_and_do_not_depend_on_their_number():
    config = GenerationConfig(max_new_tokens=9, do_sample=True, seed=5, num_return_sequences=4)
    four = generate(HashEngine(), [[1]], config)[0]
    two = generate(HashEngine(), [[1]], config.with_options(num_return_sequences=2))[0]
    assert len({tuple(one.token_ids) for one in four}) == 4
    assert four[:2] == two


def test_a_drawn_seed_is_reported_and_repeats_the_result():
    config = GenerationConfig(max_new_tokens=9, do_sample=True)
    first, second = (generate(HashEngine(), [[1]], config)[0][0] for _ in range(2))
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    assert generate(HashEngine(), [[1]], config.with_options(seed=first.seed))[0][0] == first


def test_a_run_goes_on_where_it_was_cut():
    config = GenerationConfig(max_new_tokens=10, do_sample=True, seed=8)
    whole = generate(HashEngine(), [[1, 2]], config)[0][0].token_ids
    rest = generate(HashEngine(), [[1, 2, *whole[:4]]], config.with_options(max_new_tokens=6))[0][0].token_ids
    assert whole[:4] + rest == whole


def test_finished_rows_leave_the_batch():
    engine = HashEngine()
    config = GenerationConfig(max_new_tokens=12, eos_token_id=[3, 30, 31])
    found = generate(engine, PROMPTS, config)
    new = [len(row[0].token_ids) for row in found]
    assert len(set(new)) > 2
    rows = [batch for batch, _ in engine.calls]
    assert rows == [sum(length > step for length in new) for step in range(max(new))]
    assert engine.calls[0] == (5, 7)
    assert {width for _, width in engine.calls[1:]} == {1}


def test_sequences_share_the_reading_of_their_prompt():
    engine = HashEngine()
    config = GenerationConfig(max_new_tokens=2, do_sample=True, num_return_sequences=3)
    generate(engine, [[1, 2], [3]], config)
    assert engine.calls == [(2, 2), (6, 1)]


def test_limits_are_each_rows_own():
    config = GenerationConfig(max_length=8)
    assert [len(row[0].token_ids) for row in generate(HashEngine(), PROMPTS, config)] == [5, 7, 1, 5, 7]
    default = generate(HashEngine(context_length=10), PROMPTS)
    assert [len(row[0].token_ids) for row in default] == [7, 9, 3, 7, 9]
    assert len(generate(HashEngine(), [[1]])[0][0].token_ids) == 20


def test_results_tell_what_happened():
    tokenizer = ByteTokenizer([b"a", b"b", "<s>", b"c"])
    engine = ScriptEngine(vocab_size=4, script=[0, 1, 3, 2, 0])
    config = GenerationConfig(eos_token_id=2, max_new_tokens=5)
    ((found,),) = generate(engine, [[1]], config, tokenizer=tokenizer)
    assert (found.token_ids, found.text, found.finish_reason) == ([0, 1, 3, 2], "abc", "stop")
    assert (found.prompt_tokens, found.score, found.seed, found.logprobs) == (1, None, None, None)
    assert str(found) == "abc"
    ((found,),) = generate(engine, [[1]], config.with_options(max_new_tokens=2))
    assert (found.text, str(found), found.finish_reason) == (None, "0 1", "length")


def test_logprobs_in_all_forms():
    for logprobs, tops in [(True, None), (2, 2)]:
        config = GenerationConfig(max_new_tokens=3, logprobs=logprobs)
        ((found,),) = generate(HashEngine(), [[1]], config)
        assert len(found.logprobs) == 3
        assert max(found.logprobs) < 0
        assert (found.top_logprobs is None) == (tops is None)
        for token, logprob, top in zip(
            found.token_ids, found.logprobs, found.top_logprobs or [], strict=False
        ):
            assert len(top) == tops
            assert next(iter(top.items())) == (token, pytest.approx(logprob))


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}], ids=repr)
@pytest.mark.parametrize("after", [0, 1, 5])
def test_cancel_ends_within_one_token(mode, after):
    class Cancel:
        calls = 0

        def is_set(self):
            self.calls += 1
            return self.calls > after

    engine = HashEngine()
    config = GenerationConfig(max_new_tokens=50, **mode)
    ((found,), (other,)) = generate(engine, [[1], [2, 3]], config, cancel=Cancel())
    assert len(engine.calls) == after
    assert len(found.token_ids) == len(other.token_ids) == after
    assert found.finish_reason == "cancelled"


def test_an_event_from_a_callback_cancels():
    event = threading.Event()
    seen = []

    def on_token(token):
        seen.append(token)
        if len(seen) == 4:
            event.set()

    engine = HashEngine()
    found = generate(engine, [[1], [2]], GenerationConfig(max_new_tokens=50), cancel=event, on_token=on_token)
    assert [len(row[0].token_ids) for row in found] == [2, 2]
    assert [(token.prompt, token.token_id) for token in seen[::2]] == [
        (0, one) for one in found[0][0].token_ids
    ]
    assert len(engine.calls) == 2


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=repr)
def test_on_token_sees_every_token(mode):
    seen = []
    config = GenerationConfig(max_new_tokens=5, **mode)
    found = generate(HashEngine(), [[1], [2]], config, on_token=seen.append)
    for number, (one,) in enumerate(found):
        tokens = [token for token in seen if token.prompt == number]
        assert [token.token_id for token in tokens] == one.token_ids
        assert [token.finish_reason for token in tokens] == [None] * 4 + ["length"]


def test_empty_requests_and_prompts():
    assert generate(HashEngine(), []) == []
    config = GenerationConfig(max_new_tokens=3)
    with pytest.raises(EmptyPromptError, match="prompt 1 is empty"):
        generate(HashEngine(), [[1], []], config)
    bos = config.with_options(bos_token_id=7)
    assert generate(HashEngine(), [[]], bos) == generate(HashEngine(), [[7]], config)


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        ([3, 50], TokenIdError, "id 50"),
        ([-1], TokenIdError, "id -1"),
        ([1.5], DtypeError, "float64"),
        ([True], DtypeError, "bool"),
        ("text", DtypeError, "a text"),
        ([[1], [2]], ShapeError, r"\(2, 1\)"),
        ([[1], [2, 3]], ShapeError, "flat list"),
        (4, ShapeError, r"\(\)"),
    ],
    ids=repr,
)
def test_bad_prompts(prompt, error, words):
    engine = HashEngine()
    with pytest.raises(error, match=words) as caught:
        generate(engine, [[1], prompt])
    assert "prompt 1" in str(caught.value)
    assert engine.calls == []


def test_prompts_may_be_arrays():
    for dtype in (np.int32, np.uint8, np.int64):
        assert generate(HashEngine(), [np.array([1, 2], dtype)]) == generate(HashEngine(), [[1, 2]])


def test_the_context_is_a_limit():
    engine = HashEngine(context_length=10)
    generate(engine, [[1] * 4], GenerationConfig(max_new_tokens=6))
    for prompt, options in [(5, {"max_new_tokens": 6}), (10, {}), (2, {"max_length": 11}), (12, {})]:
        with pytest.raises(ContextLengthError, match="context of 10"):
            generate(engine, [[1] * prompt], GenerationConfig(**options))
    with pytest.raises(ContextLengthError, match="max_length=5"):
        generate(engine, [[1] * 5], GenerationConfig(max_length=5))


def test_requests_that_cannot_be_met():
    with pytest.raises(UnsupportedOptionError, match="2 seeds were given for 3"):
        generate(HashEngine(), [[1], [2], [3]], GenerationConfig(do_sample=True, seed=[1, 2]))
    with pytest.raises(TokenizerError, match="tokenizer"):
        generate(HashEngine(), [[1]], GenerationConfig(stop_strings="a"))
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"):
        value = 50 if name.startswith("forced") else [50]
        with pytest.raises(TokenIdError, match=f"{name} names id 50"):
            generate(HashEngine(), [[1]], GenerationConfig(**{name: value}))
    with pytest.raises(TokenIdError, match="bad_words_ids"):
        generate(HashEngine(), [[1]], GenerationConfig(bad_words_ids=[[1, 50]]))
