"""Stop strings: where they are found, and what is cut."""

import numpy as np
import pytest
from generation_fakes import ByteTokenizer, ScriptEngine

from lmopt.generation import GenerationConfig, generate
from lmopt.generation.stopping import StopStrings

TOKENS = [
    b"a",
    b"b",
    b"abc",
    b"cd",
    b" the",
    b"\xe2",
    b"\x82\xac",
    b"\xac!",
    b"\xe2\x82",
    "<end>",
    b"stop",
    b"per",
    b"st",
]


def find(strings, ids):
    return StopStrings(strings, ByteTokenizer(TOKENS)).matches(np.array(ids))


@pytest.mark.parametrize(
    ("strings", "ids", "expected"),
    [
        (["ab"], [0, 1], True),
        (["ab"], [0, 1, 0], False),  # ended with an earlier token
        (["ab", "ba"], [0, 1, 0], True),
        (["bc"], [2], True),
        (["bcc"], [2, 3], True),
        (["stoppe"], [10, 11], True),
        (["topp"], [12, 10, 11], True),
        (["€"], [5, 6], True),
        (["€"], [5], False),
        (["€"], [8, 7], True),  # completed by a token that goes on
        (["a€b"], [0, 8, 7, 1], False),
        (["b<end>"], [1, 9], True),
        (["<end>"], [9, 1], False),
        (["zzz"], [0, 1, 2], False),
        (["abab"], [0, 1, 4, 0, 1], False),
        ([" the"], [0, 4], True),
    ],
    ids=repr,
)
def test_matches(strings, ids, expected):
    assert find(strings, ids) is expected


def test_the_window_is_long_enough_for_one_byte_tokens():
    string = "ab" * 20
    ids = [0] * 50 + [0, 1] * 20
    assert find([string], ids)
    assert not find([string], ids[:-1])


def test_work_does_not_grow_with_the_text():
    tokenizer = ByteTokenizer(TOKENS)
    stops = StopStrings(["abd"], tokenizer)
    stops.matches(np.zeros(10_000, np.int64))
    stops.tail(np.zeros(10_000, np.int64))
    assert tokenizer.decoded < 100


@pytest.mark.parametrize(
    ("strings", "ids", "expected"),
    [
        (["bcX"], [2], 2),  # "abc": "bc" may begin it
        (["X"], [2], 0),
        (["abX", "bX"], [1, 0, 1], 2),
        (["cX", "abcd"], [2], 3),
        (["a<end>"], [1, 0], 1),
        (["a<end>b"], [1, 0, 9], 1),  # the special token itself is not seen
        (["bc"], [2], 2),
    ],
    ids=repr,
)
def test_tail(strings, ids, expected):
    assert StopStrings(strings, ByteTokenizer(TOKENS)).tail(np.array(ids)) == expected


@pytest.mark.parametrize(
    ("strings", "script", "tokens", "text"),
    [
        (["bc"], [4, 2, 0], [4, 2], " thea"),
        (["stoppe"], [0, 10, 11, 0], [0, 10, 11], "a"),
        (["a<end>"], [4, 0, 9, 0], [4, 0, 9], " the"),
        (["€"], [0, 8, 7, 0], [0, 8, 7], "a"),
        (["xa"], [0, 1], [0], ""),  # begins in the prompt
        (["nothing"], [0, 1], [0, 1], "ab"),
    ],
    ids=repr,
)
def test_tokens_keep_the_stop_string_and_the_text_does_not(strings, script, tokens, text):
    tokenizer = ByteTokenizer([*TOKENS, b"x"])
    engine = ScriptEngine(vocab_size=len(TOKENS) + 1, script=script)
    config = GenerationConfig(stop_strings=strings, max_new_tokens=len(script))
    ((found,),) = generate(engine, [[len(TOKENS)]], config, tokenizer=tokenizer)
    assert found.token_ids == tokens
    assert found.text == text
    assert found.finish_reason == ("length" if strings == ["nothing"] else "stop_string")


def test_an_end_token_goes_before_a_stop_string():
    config = GenerationConfig(stop_strings=["<end>"], eos_token_id=9, max_new_tokens=3)
    engine = ScriptEngine(vocab_size=13, script=[0, 9, 0])
    ((found,),) = generate(engine, [[1]], config, tokenizer=ByteTokenizer(TOKENS))
    assert found.finish_reason == "stop"
