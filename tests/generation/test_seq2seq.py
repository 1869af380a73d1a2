"""Encoder-decoders write the same tokens as transformers' own `generate`."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lmopt
from lmopt.errors import ContextLengthError, DtypeError, ShapeError, TokenIdError, UnsupportedError
from lmopt.testing.models import tiny_gpt
from lmopt.testing.seq2seq import SEQ2SEQ_SOURCE, tiny_bart, tiny_seq2seq, tiny_t5, tiny_whisper

WORDS = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {f"w{n}": n for n in range(99)}, "unk_token": "w0"},
    }
)
SOURCES = [[5, 6, 7, 8, 9, 10, 11], [40, 41, 42], [77, 3, 50, 51, 52]]


@pytest.fixture(scope="module")
def models() -> dict[str, lmopt.Model]:
    return {
        "t5": lmopt.Model.from_module(tiny_t5()),
        "bart": lmopt.Model.from_module(tiny_bart()),
        "whisper": lmopt.Model.from_module(tiny_whisper()),
    }


def sources_of(name: str) -> list[Any]:
    if name != "whisper":
        return SOURCES
    drawn = np.random.default_rng(0).normal(size=(3, 8, 40))
    return list(drawn.astype(np.float32))


def by_transformers(model: Any, source: Any, **options: Any) -> list[int]:
    """Generate from one source alone, without padding; give the ids after the decoder's prompt."""
    inputs = torch.as_tensor(np.asarray(source))[None]
    prompt = options.get("decoder_input_ids")
    if prompt is not None:
        options["decoder_input_ids"] = torch.tensor([prompt])
    with torch.no_grad():
        # Whisper's own generate adds rules of speech; the loop beneath it is what is compared.
        given = transformers.GenerationMixin.generate(model, inputs, **options)[0].tolist()
    # Its start token comes first, unless a speech model is told otherwise.
    return given[1 if prompt is None else len(prompt) + (model.main_input_name == "input_ids") :]


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 12},
        {"max_new_tokens": 10, "num_beams": 3, "length_penalty": 1.7},
        {"max_new_tokens": 8, "num_beams": 2, "length_penalty": -0.5, "early_stopping": True},
        {
            "max_new_tokens": 8,
            "forced_bos_token_id": 17,
            "suppress_tokens": [4, 9],
            "begin_suppress_tokens": [30],
        },
        {"max_new_tokens": 8, "decoder_input_ids": [3, 8, 21]},
    ],
    ids=["greedy", "beams", "early", "forced", "prompt"],
)
def test_same_tokens_as_transformers(
    models: dict[str, lmopt.Model], name: str, options: dict[str, Any]
) -> None:
    model, sources = models[name], sources_of(name)
    with lmopt.Runtime(model) as rt:
        found = rt.generate(sources, **options)
    for one, source in zip(found, sources, strict=True):
        assert one.token_ids == by_transformers(model.module, source, **options)


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_a_row_does_not_depend_on_its_neighbours(models: dict[str, lmopt.Model], name: str) -> None:
    sources, prompts = sources_of(name), [[3], [3, 9, 4, 8], [7, 5]]
    options: dict[str, Any] = {"max_new_tokens": 7, "do_sample": True, "temperature": 1.3, "seed": [1, 2, 3]}
    # Two at a time: the third enters when one leaves, at another length than the one that stays.
    with lmopt.Runtime(models[name], max_num_seqs=2) as rt:
        together = rt.generate(sources, decoder_input_ids=prompts, **options)
        alone = [
            rt.generate(source, decoder_input_ids=prompt, **{**options, "seed": seed})
            for source, prompt, seed in zip(sources, prompts, (1, 2, 3), strict=True)
        ]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_own_module_keeps_sources_of_unequal_length_apart() -> None:
    model = lmopt.Model.from_module(tiny_seq2seq(), source=SEQ2SEQ_SOURCE)
    sources = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14], [50]]
    with lmopt.Runtime(model) as rt:
        assert not rt.engine.ragged
        greedy = rt.generate(sources, max_new_tokens=6)
        beams = rt.generate(sources, max_new_tokens=6, num_beams=3)
        together = rt.score([[1, 5, 6]] * 4, sources=sources)
        for source, scores in zip(sources, together, strict=True):
            np.testing.assert_allclose(scores, rt.score([1, 5, 6], sources=source), atol=1e-5)
        for source, one, other in zip(sources, greedy, beams, strict=True):
            assert one.token_ids == by_hand(model.module, source, 6)
            assert other.token_ids == rt.generate(source, max_new_tokens=6, num_beams=3).token_ids


def by_hand(module: Any, source: list[int], steps: int) -> list[int]:
    """Decode greedily, reading everything anew for each token."""
    ids = [SEQ2SEQ_SOURCE.start_token_id]
    with torch.no_grad():
        for _ in range(steps):
            logits, _ = module(torch.tensor([ids]), module.encode(torch.tensor([source])))
            ids.append(int(logits[0, -1].argmax()))
    return ids[1:]


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_scores_are_log_probabilities_given_the_source(models: dict[str, lmopt.Model], name: str) -> None:
    model, sources, rows = models[name], sources_of(name), [[3, 5, 9], [3, 8], [3, 30, 31, 32]]
    with lmopt.Runtime(model) as rt:
        found = rt.score(rows, sources=sources)
    for source, row, scores in zip(sources, rows, found, strict=True):
        inputs = {model.module.main_input_name: torch.as_tensor(np.asarray(source))[None]}
        with torch.no_grad():
            logits = model.module(**inputs, decoder_input_ids=torch.tensor([row])).logits[0]
        expected = logits.log_softmax(-1)[range(len(row) - 1), row[1:]]
        np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4)


def test_stream_is_what_generate_says(models: dict[str, lmopt.Model]) -> None:
    tokenizer = lmopt.Tokenizer(WORDS)
    with lmopt.Runtime(models["t5"], tokenizer=tokenizer) as rt:
        pieces = "".join(rt.stream([5, 6, 7], max_new_tokens=6))
        assert pieces == rt.generate([5, 6, 7], max_new_tokens=6).text != ""


def test_bad_sources_are_refused(models: dict[str, lmopt.Model]) -> None:
    with lmopt.Runtime(models["bart"]) as rt:
        with pytest.raises(TokenIdError, match="source 0 holds id 99"):
            rt.generate([5, 99])
        with pytest.raises(ContextLengthError, match="source 1 has 65 positions; the encoder takes 64"):
            rt.generate([[5], [5] * 65])
        with pytest.raises(ShapeError, match="source 0 is empty"):
            rt.generate([[]])
        with pytest.raises(UnsupportedError, match="source 0 is missing"):
            rt.score([[3, 4]])
        with pytest.raises(UnsupportedError, match="begin with a source"):
            rt.engine.begin(1)
    with lmopt.Runtime(models["whisper"]) as rt:
        with pytest.raises(ShapeError, match="takes exactly 40"):
            rt.generate(np.zeros((8, 39), np.float32))
        with pytest.raises(DtypeError, match="expected features in float32"):
            rt.generate(np.zeros((8, 40), np.int64))
        with pytest.raises(DtypeError, match="this model reads features"):
            rt.generate("a text")


def test_a_model_without_an_encoder_takes_no_source() -> None:
    with (
        lmopt.Runtime(lmopt.Model.from_module(tiny_gpt())) as rt,
        pytest.raises(UnsupportedError, match="without an encoder"),
    ):
        rt.score([3, 4], sources=[5])
