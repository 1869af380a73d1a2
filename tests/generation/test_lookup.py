"""Prompt lookup: the same tokens, fewer calls, and off where it does not pay."""

import dataclasses

import numpy as np
import pytest
from generation_fakes import ByteTokenizer, EchoEngine, HashEngine, RewindEngine
from hypothesis import given, settings
from hypothesis import strategies as st

from lmopt.generation import GenerationConfig, Limits, Workspace, generate, stream
from lmopt.generation.costs import CallCosts
from lmopt.generation.history import History
from lmopt.generation.lookup import Drafting, Lookup

TEXT = [7, 12, 31, 8, 40, 41, 17, 9, 22, 23, 24, 13, 44, 45, 10, 11, 33, 34, 35, 36]
MODES = [
    {},
    {"do_sample": True, "seed": 11},
    {"do_sample": True, "seed": [4, 5, 6], "top_k": 0, "top_p": 0.95, "temperature": 1.4},
    {"do_sample": True, "seed": 2, "num_return_sequences": 2, "min_p": 0.02},
    {"repetition_penalty": 1.7, "min_new_tokens": 20},
    {"no_repeat_ngram_size": 4, "logprobs": 2},
    {"suppress_tokens": [31, 13], "forced_eos_token_id": 3, "bad_words_ids": [[40, 41]]},
]
PROMPTS = [TEXT, [*TEXT[5:], 2, *TEXT[:4]], [1, 2, 7]]


class Fixed:
    """Costs that are what they are."""

    def __init__(self, a_token):
        self.a_token = a_token

    def ratio(self, rows, drafted):
        return 1.0 + self.a_token * drafted

    def record(self, rows, drafted, seconds):
        pass


def free(a_token=0.05, **limits):
    return Workspace(Limits(**limits), costs=Fixed(a_token))


def engine(**options):
    return EchoEngine(text=TEXT, **options)


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("strength", [12.0, 5.0])
@pytest.mark.parametrize("mode", MODES, ids=repr)
def test_tokens_are_those_of_plain_decoding(mode, strength, ragged):
    config = GenerationConfig(max_new_tokens=40, eos_token_id=[3, 49], **mode)
    drafted = 0
    plain = engine(strength=strength, ragged=ragged)
    expected = generate(plain, PROMPTS, config)
    for ngram, most in [(1, 1), (2, 4), (3, 10), (None, 30)]:
        drafting = config.with_options(prompt_lookup_num_tokens=most, max_matching_ngram_size=ngram)
        fast = engine(strength=strength, ragged=ragged)
        found = generate(fast, PROMPTS, drafting, workspace=free())
        assert found == expected
        drafted += sum(one.drafted for row in found for one in row)
        assert not fast.alive
    assert drafted > 10 or "repetition_penalty" in mode


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_mixture_of_rows_gives_the_tokens_of_plain_decoding(data):
    rows = data.draw(
        st.lists(st.lists(st.sampled_from(TEXT), min_size=1, max_size=20), min_size=1, max_size=5)
    )
    configs = [
        GenerationConfig(
            max_new_tokens=data.draw(st.integers(1, 25)),
            do_sample=data.draw(st.booleans()),
            seed=number,
            eos_token_id=data.draw(st.sampled_from([None, 9, 36])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
            prompt_lookup_num_tokens=data.draw(st.sampled_from([None, 1, 3, 12])),
            max_matching_ngram_size=data.draw(st.sampled_from([None, 1, 5])),
        )
        for number in range(len(rows))
    ]
    limits = {
        "max_num_seqs": data.draw(st.integers(1, 4)),
        "max_num_batched_tokens": data.draw(st.integers(1, 9)),
    }
    found = generate(engine(strength=7.0), rows, configs, workspace=free(0.01, **limits))
    plain = [one.with_options(prompt_lookup_num_tokens=None) for one in configs]
    for row, one, expected in zip(rows, plain, found, strict=True):
        assert generate(engine(strength=7.0), [row], one.with_options(seed=one.seed))[0] == expected


def test_a_quote_takes_few_calls():
    config = GenerationConfig(max_new_tokens=120, eos_token_id=None)
    looping = [*TEXT, TEXT[0]]
    prompt = TEXT * 3
    plain, fast = EchoEngine(text=looping, strength=40.0), EchoEngine(text=looping, strength=40.0)
    expected = generate(plain, [prompt], config)
    ((found,),) = generate(
        fast, [prompt], config.with_options(prompt_lookup_num_tokens=10), workspace=free(0.2)
    )
    assert [[found]] == expected
    assert len(plain.calls) == 120
    assert len(fast.calls) < 30
    assert found.accepted == found.drafted > 80
    assert found.drafted == fast.read - len(prompt) - (len(fast.calls) - 1)


def test_it_pauses_where_nothing_repeats_and_comes_back_where_something_does():
    def calls(strength, a_token):
        fast = engine(strength=strength, vocab_size=50)
        config = GenerationConfig(max_new_tokens=400, prompt_lookup_num_tokens=10, do_sample=True, seed=1)
        ((found,),) = generate(fast, [TEXT * 3], config, workspace=free(a_token))
        steps = [width for _, width in fast.calls[1:]]
        return found, steps, sum(1 + a_token * (width - 1) for width in steps)

    # Free text: random tokens repeat all the time, and what follows them does not.
    found, steps, cost = calls(0.0, 0.25)
    assert found.drafted < 40
    assert cost < 1.03 * 400
    assert max(np.flatnonzero(np.array(steps) > 1)) > 100  # it has tried again
    # Where a call with a draft is ten plain ones, it is not worth it, however good the drafts.
    found, steps, cost = calls(0.0, 10.0)
    assert cost < 1.5 * 400


def test_a_pause_grows_and_ends_with_a_draft_that_is_right():
    row = dataclasses.make_dataclass("Row", ["lookup", "history"])
    tokens = np.array([5, 6, 7, 8, 5, 6] + [0] * 2000)
    one = row(Lookup(4, 3), History(tokens, 6, 6))
    drafting = Drafting(Fixed(3.0))
    gaps, waited = [], 0
    for _ in range(1500):
        drafts = drafting.propose([one])
        if drafts is None:
            waited += 1
            continue
        assert drafts[0].tolist() == [7, 8]
        gaps.append(waited)
        waited = 0
        drafting.judge([one], drafts, [2 if len(gaps) == 5 else 0])
    assert gaps[:7] == [31, 63, 127, 255, 511, 31, 63]


def test_the_end_is_where_it_would_be():
    tokenizer = ByteTokenizer([bytes([40 + n]) for n in range(50)])
    text = "".join(chr(40 + n) for n in TEXT)
    for options, reason in [
        ({"stop_strings": [text[9:12]]}, "stop_string"),
        ({"eos_token_id": TEXT[10]}, "stop"),
        ({"eos_token_id": TEXT[10], "min_new_tokens": 14}, None),
        ({"max_new_tokens": 7}, "length"),
    ]:
        config = GenerationConfig(**{"max_new_tokens": 18, **options})
        expected = generate(engine(strength=40.0), [TEXT * 2 + [7]], config, tokenizer=tokenizer)
        lookup = config.with_options(prompt_lookup_num_tokens=15)
        seen = []
        found = generate(
            engine(strength=40.0), [TEXT * 2 + [7]], lookup,
            tokenizer=tokenizer, workspace=free(), on_token=seen.append,
        )  # fmt: skip
        assert found == expected
        assert found[0][0].accepted > 3
        assert reason in (None, found[0][0].finish_reason)
        assert [token.token_id for token in seen] == found[0][0].token_ids
        assert [token.finish_reason for token in seen] == [None] * (len(seen) - 1) + [
            found[0][0].finish_reason
        ]
        pieces = list(
            stream(engine(strength=40.0), TEXT * 2 + [7], lookup, tokenizer=tokenizer, workspace=free())
        )
        assert "".join(pieces) == found[0][0].text
        assert len(pieces) > 3


def test_an_engine_that_cannot_rewind_decodes_plainly():
    config = GenerationConfig(max_new_tokens=30, prompt_lookup_num_tokens=10)
    expected = generate(HashEngine(), [TEXT], config.with_options(prompt_lookup_num_tokens=None))
    for plain in (HashEngine(), RewindEngine(rewinds=False)):
        found = generate(plain, [TEXT], config, workspace=free())
        assert found == expected
        assert found[0][0].drafted == 0
        assert {width for _, width in plain.calls[1:]} == {1}


@pytest.mark.parametrize(
    ("seen", "largest", "most", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 3, 2, (2, [3, 4])),
        ([1, 2, 3, 4, 1, 2], 1, 9, (1, [3, 4, 1, 2])),
        ([9, 1, 2, 7, 5, 1, 2, 8, 6, 9, 1, 2], 3, 3, (3, [7, 5, 1])),  # the longest match
        ([1, 2, 7, 7, 1, 2, 8, 8, 1, 2], 2, 2, (2, [8, 8])),  # else the latest
        ([1, 2, 7, 7, 1, 2, 8, 1, 2], 2, 4, (2, [7, 7, 1, 2])),  # that enough follows
        ([5, 5, 5, 5], 3, 3, (3, [5])),
        ([1, 2, 3], 3, 3, (0, [])),
        ([1], 3, 3, (0, [])),
    ],
)
def test_what_a_draft_is(seen, largest, most, expected):
    history = History.start(np.array(seen), 50)
    size, draft = Lookup(most, largest).find(history)
    assert (size, draft.tolist()) == expected


def test_a_draft_stays_within_the_rows_limit():
    history = History.start(np.array(TEXT * 2), 4)
    assert Lookup(10, 3).find(history)[1].size == 3
    history = History.start(np.array(TEXT * 2), 1)
    assert Lookup(10, 3).find(history)[1].size == 0


def test_costs_are_guessed_until_they_are_measured():
    costs = CallCosts()
    assert costs.ratio(1, 4) == pytest.approx(1.8)
    assert costs.ratio(8, 3) == pytest.approx(3.0)
    costs.record(1, 4, 9.0)
    assert costs.ratio(1, 4) == pytest.approx(1.8)  # nothing to compare with yet
    for seconds in (2.0, 2.0, 99.0):
        costs.record(1, 0, seconds)
    assert costs.ratio(1, 4) == pytest.approx(4.5)
    assert costs.ratio(1, 2) == pytest.approx(2.75)
    assert costs.ratio(1, 8) == pytest.approx(8.0)
    assert costs.ratio(2, 4) == pytest.approx(1 + 8 / 6)
    costs.record(1, 1, 1.0)
    assert costs.ratio(1, 1) == 1.0
