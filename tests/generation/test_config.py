"""Options: names, ranges, defaults of a model, and what lmopt does not implement."""

import dataclasses
import json

import pytest

from lmopt.errors import UnsupportedOptionError
from lmopt.generation import GenerationConfig
from lmopt.generation.options import HARMLESS, NEUTRAL


def test_names_and_defaults_are_those_of_transformers():
    from transformers import GenerationConfig as Theirs

    theirs = Theirs()
    defaults = Theirs._get_default_generation_params()
    # Only Whisper's files have these.
    of_speech = {
        "return_timestamps": False,
        "no_timestamps_token_id": None,
        "max_initial_timestamp_index": None,
    }
    for field in dataclasses.fields(GenerationConfig):
        if field.name in of_speech:
            assert field.default is of_speech[field.name]
        elif field.name not in ("logprobs", "seed"):
            assert hasattr(theirs, field.name)
            expected = defaults.get(field.name)
            if field.name != "max_length":  # theirs is the 20 that ours is without a limit
                neutral = {"renormalize_logits": False}.get(field.name)
                assert field.default == (neutral if expected is None else expected)


def test_every_field_of_transformers_is_implemented_or_listed():
    from transformers import GenerationConfig as Theirs

    known = {field.name for field in dataclasses.fields(GenerationConfig)} | HARMLESS | set(NEUTRAL)
    assert set(vars(Theirs())) <= known


def test_a_default_file_of_transformers_is_neutral():
    from transformers import GenerationConfig as Theirs

    file = json.loads(Theirs().to_json_string(use_diff=False))
    assert GenerationConfig.from_options(file) == GenerationConfig()
    file |= {
        name: value for name, value in Theirs._get_default_generation_params().items() if name != "max_length"
    }
    assert GenerationConfig.from_options(file) == GenerationConfig()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.01},
        {"top_p": -0.1},
        {"min_p": 2},
        {"typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram_size": -1},
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"max_length": 0},
        {"min_new_tokens": -1},
        {"num_beams": 0},
        {"num_return_sequences": 0},
        {"early_stopping": "sometimes"},
        {"eos_token_id": -1},
        {"eos_token_id": "a"},
        {"eos_token_id": [1, 2.5]},
        {"stop_strings": ""},
        {"stop_strings": ["a", ""]},
        {"stop_strings": [3]},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [["a"]]},
        {"logprobs": -1},
        {"logprobs": "yes"},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": 1.5},
        {"seed": [1, -1]},
        {"do_sample": 1},
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 2, "num_return_sequences": 3},
        {"num_beams": 2, "logprobs": 3},
        {"num_return_sequences": 2},
        {"max_time": 0.0},
        {"prompt_lookup_num_tokens": 0},
        {"prompt_lookup_num_tokens": 4, "num_beams": 2},
        {"max_matching_ngram_size": 0},
        {"min_new_tokens": 5, "max_new_tokens": 4},
    ],
    ids=repr,
)
def test_impossible_values_name_the_option(options):
    with pytest.raises(UnsupportedOptionError) as caught:
        GenerationConfig(**options)
    assert next(iter(options)) in str(caught.value)
    assert str(next(iter(options.values()))).strip("[]") in str(caught.value) or "float" in str(caught.value)


def test_ranges_are_in_the_message():
    with pytest.raises(UnsupportedOptionError, match=r"top_p=2\.0 .* \[0, 1\]"):
        GenerationConfig(top_p=2.0)
    with pytest.raises(UnsupportedOptionError, match=r"top_k=-1 .* >= 0"):
        GenerationConfig(top_k=-1)
    with pytest.raises(UnsupportedOptionError, match="greedy"):
        GenerationConfig(temperature=0.0)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("temprature", "temperature"),
        ("max_tokens", "max_new_tokens"),
        ("stop", "stop_strings"),
        ("top-p", "top_p"),
        ("repetition_penality", "repetition_penalty"),
        ("n", "num_return_sequences"),
    ],
)
def test_unknown_options_name_the_nearest(name, near):
    with pytest.raises(UnsupportedOptionError, match=f"{name!r} is not an option.*Did you mean {near!r}"):
        GenerationConfig.from_options({}, **{name: 1})


UNSUPPORTED = {
    "penalty_alpha": 0.6,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "guidance_scale": 1.5,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "num_assistant_tokens": 7,
    "watermarking_config": {"bias": 2.0},
    "sequence_bias": [[[1], 2.0]],
    "exponential_decay_length_penalty": [3, 1.1],
    "top_h": 0.4,
    "epsilon_cutoff": 0.1,
    "assistant_early_exit": 3,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_fields_raise_unless_neutral(name):
    value = UNSUPPORTED[name]
    with pytest.raises(UnsupportedOptionError, match=f"{name}=.*does not implement"):
        GenerationConfig.from_options({}, **{name: value})
    with pytest.raises(UnsupportedOptionError, match=f"generation_config.json sets {name}="):
        GenerationConfig.from_options({name: value})
    assert GenerationConfig.from_options({name: value}, **{name: None}) == GenerationConfig()
    for neutral in (None, *NEUTRAL[name]):
        assert GenerationConfig.from_options({name: neutral}) == GenerationConfig()
        assert GenerationConfig.from_options({}, **{name: neutral}) == GenerationConfig()


def test_bookkeeping_is_harmless_in_a_file_only(caplog):
    file = {
        "transformers_version": "5",
        "use_cache": False,
        "output_attentions": True,
        "_from_model_config": True,
    }
    assert GenerationConfig.from_options(file) == GenerationConfig()
    assert not caplog.records
    with pytest.raises(UnsupportedOptionError, match="logprobs"):
        GenerationConfig.from_options({}, output_scores=True)
    with pytest.raises(UnsupportedOptionError, match="use_cache=False"):
        GenerationConfig.from_options({}, use_cache=False)
    assert GenerationConfig.from_options({}, use_cache=True) == GenerationConfig()


def test_unknown_fields_of_a_file_are_reported(caplog):
    assert GenerationConfig.from_options({"chat_format": "x"}) == GenerationConfig()
    assert "chat_format" in caplog.text


def test_options_win_over_the_file():
    file = {"eos_token_id": [2, 3], "temperature": 0.6, "top_k": 20, "max_new_tokens": 100, "top_p": None}
    config = GenerationConfig.from_options(file, eos_token_id=5, max_new_tokens=7)
    assert (config.eos_ids, config.temperature, config.top_k) == ((5,), 0.6, 20)
    assert (config.max_new_tokens, config.top_p, config.do_sample) == (7, 1.0, False)
    assert GenerationConfig.from_options(file, eos_token_id=None).eos_ids == ()
    assert GenerationConfig.from_options(file, top_k=None).top_k == 0
    assert GenerationConfig.from_options(file, max_length=50).max_new_tokens is None
    with pytest.raises(UnsupportedOptionError, match="top_k"):
        GenerationConfig.from_options({"top_k": -3})


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "typical_p"])
def test_sampling_options_turn_sampling_on(name):
    value = 5 if name == "top_k" else 0.5
    assert GenerationConfig.from_options({}, **{name: value}).do_sample
    assert GenerationConfig.from_options({"do_sample": False}, **{name: value}).do_sample
    assert not GenerationConfig.from_options({}, do_sample=False, **{name: value}).do_sample
    assert not GenerationConfig.from_options({name: value}).do_sample
    assert not GenerationConfig.from_options({}, **{name: None}).do_sample
    assert GenerationConfig.from_options({name: value, "do_sample": True}, seed=1).do_sample


def test_values_are_normalised():
    import numpy as np

    config = GenerationConfig(
        eos_token_id=np.int64(3),
        stop_strings="a",
        bad_words_ids=[[1, 1]],
        seed=[np.uint64(4)],
        top_k=np.int32(3),
    )
    assert (config.eos_ids, config.stops, config.bad_words_ids) == ((3,), ("a",), ((1, 1),))
    assert config.seed == (4,)
    assert isinstance(hash(config), int)
    assert json.dumps(dataclasses.asdict(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 4
