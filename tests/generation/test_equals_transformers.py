"""Deterministic generation gives, token for token, what transformers' `generate` gives."""

import numpy as np
import pytest
import torch
from generation_hf import PROMPTS, HfEngine, byte_level_tokenizer, hf_generate, hf_tokens, trim

from lmopt.generation import GenerationConfig, generate

GREEDY = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram_size": 1, "max_new_tokens": 12},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"suppress_tokens": list(range(0, 60, 2))},
    {"begin_suppress_tokens": list(range(40))},
    {"bad_words_ids": [[3], [7, 8], [20, 21, 22], [9, 9, 13]]},
    {"bad_words_ids": [[n, n + 3] for n in range(50)] + [[n] for n in range(0, 60, 5)]},
    {"forced_eos_token_id": 4},
    {"forced_bos_token_id": 11},
    {"forced_bos_token_id": 11, "begin_suppress_tokens": list(range(30))},
    {"renormalize_logits": True, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [5, 6, 7], "min_new_tokens": 9},
    {"max_length": 14, "max_new_tokens": None},
]


def ours(model, options, **more):
    settings = {"max_new_tokens": 24, **options}
    config = GenerationConfig.from_options({}, **settings)
    return generate(HfEngine(model), PROMPTS, config, **more)


@pytest.mark.parametrize("options", GREEDY, ids=repr)
def test_greedy(hf_model, options):
    found = ours(hf_model, options)
    for prompt, (generation,) in zip(PROMPTS, found, strict=True):
        assert generation.token_ids == hf_tokens(hf_model, prompt, **options)


def frequent(model, count):
    """Tokens that greedy decoding says within the first dozen, so that as `eos` they matter."""
    said = [hf_tokens(model, prompt)[3:12] for prompt in PROMPTS]
    return [row[number % len(row)] for number, row in enumerate((said * count)[:count])]


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"min_new_tokens": 10},
        {"min_length": 16},
        {"min_new_tokens": 24},
        {"repetition_penalty": 1.2},
        {"bad_words": True},
    ],
    ids=repr,
)
@pytest.mark.parametrize("count", [1, 3])
def test_eos(hf_model, count, extra):
    eos = frequent(hf_model, count)
    extra = dict(extra)
    if extra.pop("bad_words", False):
        extra["bad_words_ids"] = [[token] for token in [*eos, 1, 2]]  # ids of eos are never banned
    found = ours(hf_model, {"eos_token_id": eos, **extra})
    reasons = set()
    for prompt, (generation,) in zip(PROMPTS, found, strict=True):
        theirs = hf_tokens(hf_model, prompt, eos_token_id=eos, **extra)
        assert generation.token_ids == theirs
        assert generation.finish_reason == ("stop" if theirs[-1] in eos else "length")
        reasons.add(generation.finish_reason)
    if not extra:
        assert "stop" in reasons


BEAMS = [
    {"num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 4, "early_stopping": True, "num_return_sequences": 4},
    {"num_beams": 4, "early_stopping": "never", "num_return_sequences": 2},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": -0.5},
    {"num_beams": 3, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "num_return_sequences": 3},
    {"num_beams": 3, "renormalize_logits": True, "suppress_tokens": [1, 2, 3, 4, 5], "min_new_tokens": 5},
    {"num_beams": 5, "forced_eos_token_id": 4, "max_new_tokens": 8},
    {"num_beams": 3, "max_new_tokens": 1, "num_return_sequences": 3},
]


@pytest.mark.parametrize("options", BEAMS, ids=repr)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_beams(hf_model, options, count):
    eos = frequent(hf_model, count) or None
    options = {**options, "eos_token_id": eos}
    found = ours(hf_model, {**options, "logprobs": True})
    for prompt, generations in zip(PROMPTS, found, strict=True):
        sequences, scores = hf_generate(hf_model, prompt, **options)
        assert [one.token_ids for one in generations] == [trim(row, eos or ()) for row in sequences]
        assert np.allclose([one.score for one in generations], scores, atol=1e-4)
        for one in generations:
            assert one.finish_reason == ("stop" if one.token_ids[-1] in (eos or ()) else "length")
            assert len(one.logprobs) == len(one.token_ids)
            if not {"repetition_penalty", "suppress_tokens", "forced_eos_token_id"} & set(options):
                length = len(one.token_ids) ** options.get("length_penalty", 1.0)
                # Sums are what float32 rounds, not what a length makes of them.
                assert one.score * length == pytest.approx(sum(one.logprobs), abs=1e-4)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(
    ("beams", "length_penalty", "step"), [(2, 1.0, 7), (3, 1.0, 4), (2, 2.0, 4), (3, 0.5, 7)]
)
def test_beams_among_many_ends(hf_model, early_stopping, beams, length_penalty, step):
    """With many end-of-sequence ids the three ways to stop early part, and the spare candidates count."""
    eos = list(range(0, 61, step))
    options = {"num_beams": beams, "length_penalty": length_penalty, "num_return_sequences": beams}
    options |= {"early_stopping": early_stopping, "eos_token_id": eos}
    for prompt, generations in zip(PROMPTS, ours(hf_model, options), strict=True):
        sequences, scores = hf_generate(hf_model, prompt, **options)
        assert [one.token_ids for one in generations] == [trim(row, eos) for row in sequences]
        assert np.allclose([one.score for one in generations], scores, atol=1e-4)


def test_beams_of_a_left_padded_batch(hf_model):
    """transformers' own batch of unequal prompts gives what ours does."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
    eos = frequent(hf_model, 2)
    options = {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": eos, "max_new_tokens": 20}
    theirs = hf_model.generate(
        ids, attention_mask=mask, pad_token_id=0, return_dict_in_generate=True, output_scores=True, **options
    )
    found = [one for row in ours(hf_model, options) for one in row]
    assert [one.token_ids for one in found] == [trim(row[width:].tolist(), eos) for row in theirs.sequences]
    assert np.allclose([one.score for one in found], theirs.sequences_scores, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    "stops",
    [["b"], ["ab", "c"], [" d"], ["€"], ["x€"], ["hi", "g"], ["</s>"], ["e</s>"], ["zzzzzz"], ["efgh", "."]],
    ids=repr,
)
def test_stop_strings(llama, stops, beams):
    theirs_tokenizer, tokenizer = byte_level_tokenizer()
    prompts = [*PROMPTS, [34, 35], [43, 2]]  # one ends within a euro sign
    options = {"stop_strings": stops, "num_beams": beams, "max_new_tokens": 40, "repetition_penalty": 1.5}
    config = GenerationConfig.from_options({}, **options)
    found = generate(HfEngine(llama), prompts, config, tokenizer=tokenizer)
    for prompt, (generation,) in zip(prompts, found, strict=True):
        (theirs,), _ = hf_generate(llama, prompt, tokenizer=theirs_tokenizer, **options)
        assert generation.token_ids == theirs[: len(generation.token_ids)]
        assert set(theirs[len(generation.token_ids) :]) <= {0}
        text = tokenizer.decode(generation.token_ids)
        assert text.startswith(generation.text)
        if generation.finish_reason == "stop_string":
            assert not any(stop in generation.text for stop in stops)
        else:
            assert generation.text == text


def test_logprobs_are_those_of_the_raw_logits(llama):
    config = GenerationConfig(max_new_tokens=6, repetition_penalty=1.5, logprobs=5)
    ((generation,),) = generate(HfEngine(llama), PROMPTS[:1], config)
    row = torch.tensor([PROMPTS[0] + generation.token_ids])
    with torch.inference_mode():
        logs = llama(row).logits[0].log_softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    chosen = logs.gather(1, row[0, len(PROMPTS[0]) :, None])[:, 0]
    assert np.allclose(generation.logprobs, chosen, atol=1e-5)
    best = logs.topk(5)
    for place, top in enumerate(generation.top_logprobs):
        assert list(top) == best.indices[place].tolist()
        assert np.allclose(list(top.values()), best.values[place], atol=1e-5)
