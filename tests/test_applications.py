"""Translation and speech recognition as users call them."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lmopt
from lmopt.applications import Opinion
from lmopt.errors import UnsupportedError, UnsupportedOptionError, VocabularyMismatchError
from lmopt.generation.fusion import Fusion
from lmopt.speech import LogMel, Segment, read_audio, segments
from lmopt.speech.cutting import cut
from lmopt.testing.models import tiny_gpt
from lmopt.testing.seq2seq import VOCAB_SIZE, tiny_t5, tiny_whisper

SPECIAL = {3: "<|start|>", 90: "<|en|>", 91: "<|de|>", 92: "<|transcribe|>", 93: "<|translate|>"}
WORDS = lmopt.Tokenizer(
    json.dumps(
        {
            "version": "1.0",
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "added_tokens": [],
            "model": {
                "type": "WordLevel",
                "vocab": {SPECIAL.get(n, f"w{n}"): n for n in range(99)},
                "unk_token": "w0",
            },
        }
    )
)
SEVERAL = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": 90, "<|de|>": 91},
    "no_timestamps_token_id": 95,
    "eos_token_id": 2,
    "max_length": 12,
}


def test_translate_gives_texts(caplog: pytest.LogCaptureFixture) -> None:
    with lmopt.Runtime(lmopt.Model.from_module(tiny_t5(), tokenizer=WORDS)) as rt:
        texts = ["w5 w6 w7 w8", "w40 w41"]
        with caplog.at_level(logging.WARNING):
            found = rt.translate(texts)
        # Twice the longest source and 20 more; a seeded model does not know when to stop.
        expected = rt.generate(texts, max_new_tokens=28)
        assert found == [one.text.strip() for one in expected]
        assert "2 of 2 texts reached the limit before their end" in caplog.text
        assert rt.translate(texts[1], max_new_tokens=28) == found[1]
        assert rt.translate([]) == []
        assert rt.translate(texts[1], decoder_input_ids=[9], max_new_tokens=4) != found[1]
        with pytest.raises(UnsupportedError, match="no encoder that reads log-mel features"):
            rt.transcribe(np.zeros(100, np.float32))


def test_transcribe_hears_the_language_and_asks_for_the_task() -> None:
    model = lmopt.Model.from_module(tiny_whisper(), tokenizer=WORDS, generation_config=SEVERAL)
    sound = np.random.default_rng(0).normal(size=(2, 6000)).astype(np.float32)
    features = [LogMel(8, 40)(one) for one in sound]
    with torch.no_grad():
        logits = model.module(
            torch.tensor(np.stack(features)), decoder_input_ids=torch.full((2, 1), 3)
        ).logits
    heard = [90 + int(one[-1, 90:92].argmax()) for one in logits]
    with lmopt.Runtime(model) as rt:
        for options, prompts in (
            ({}, [[3, one, 92, 95] for one in heard]),
            ({"language": "de", "task": "translate"}, [[3, 91, 93, 95]] * 2),
        ):
            expected = [one.text.strip() for one in rt.generate(features, decoder_input_ids=prompts)]
            assert rt.transcribe(list(sound), **options) == expected
            assert rt.transcribe(sound[0], **options) == expected[0]
        # Longer than the encoder takes: in pieces, all in the language of the first.
        long = np.concatenate([sound[0], sound[1], sound[0]])
        pieces = cut(long, 40 * 160, 16000)
        first = model.module.config.decoder_start_token_id
        logits = rt.logits([first], sources=LogMel(8, 40)(pieces[0]))
        spoken = ["en", "de"][int(logits[-1, 90:92].argmax())]
        parts = [rt.transcribe(one, language=spoken) for one in pieces]
        assert len(parts) > 2
        assert rt.transcribe([long, sound[1]]) == [" ".join(parts), rt.transcribe(sound[1])]
        with pytest.raises(UnsupportedOptionError, match="language 'fr' is unknown"):
            rt.transcribe(sound[0], language="fr")
        with pytest.raises(UnsupportedError, match="no encoder that reads text"):
            rt.translate("w5")


def test_transcribe_tells_when_it_is_said() -> None:
    one_language = {"no_timestamps_token_id": 80, "eos_token_id": 2, "max_length": 14}
    model = lmopt.Model.from_module(tiny_whisper(), tokenizer=WORDS, generation_config=one_language)
    sound = np.random.default_rng(0).normal(size=(2, 6000)).astype(np.float32)
    hear = LogMel(8, 40)
    with lmopt.Runtime(model) as rt:
        expected = []
        for one in sound:
            tokens = rt.generate(hear(one), decoder_input_ids=[3], return_timestamps=True).token_ids
            assert tokens[0] > 80
            assert 80 not in tokens
            expected.append(segments(tokens, WORDS.decode, first_time=81, length_s=6000 / 16000))
        assert expected[0]
        assert rt.transcribe(list(sound), return_timestamps=True) == expected
        assert rt.transcribe(sound[1], return_timestamps=True) == expected[1]
        assert isinstance(rt.transcribe(sound[1]), str)
        # Longer than the encoder takes: what is said later begins later.
        long = np.concatenate([*sound, sound[0]])
        heard, offset = [], 0
        for piece in cut(long, 40 * 160, 16000):
            for one in rt.transcribe(piece, return_timestamps=True):
                shift = offset / 16000
                heard.append(Segment(round(one.start_s + shift, 2), round(one.end_s + shift, 2), one.text))
            offset += piece.size
        found = rt.transcribe(long, return_timestamps=True)
        assert [one.text for one in found] == [one.text for one in heard]
        assert [one.start_s for one in found] == pytest.approx([one.start_s for one in heard], abs=0.011)
        assert found[-1].start_s > 6000 / 16000
        # A language model reads words, not times.
        with lmopt.Runtime(
            lmopt.Model.from_module(tiny_gpt(), tokenizer=WORDS, generation_config={"bos_token_id": 1})
        ) as lm:
            opinion = Opinion(lm, 0.0)
            beams = {"num_beams": 3, "return_timestamps": True}
            assert rt.transcribe(sound[0], opinion=opinion, **beams) == rt.transcribe(sound[0], **beams)
            fused = Fusion(lm.engine, 0.1, 1)
            with pytest.raises(UnsupportedOptionError, match="a language model knows no times"):
                rt.generate(hear(sound[0]), decoder_input_ids=[3], fusion=fused, return_timestamps=True)
            with pytest.raises(UnsupportedOptionError, match="a language model knows no times"):
                rt.transcribe(sound[0], opinion=Opinion(lm, 0.1, "fuse"), return_timestamps=True)
    silent = lmopt.Model.from_module(tiny_whisper(), tokenizer=WORDS, generation_config={"eos_token_id": 2})
    with (
        lmopt.Runtime(silent) as rt,
        pytest.raises(UnsupportedOptionError, match="needs no_timestamps_token_id"),
    ):
        rt.transcribe(sound[0], return_timestamps=True)


def test_a_language_model_is_asked_for_its_opinion() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        writer = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, initializer_range=0.5, max_position_embeddings=64,
            )
        ).eval()  # fmt: skip
    model = lmopt.Model.from_module(tiny_t5(), tokenizer=WORDS)
    written = lmopt.Model.from_module(writer, tokenizer=WORDS, generation_config={"bos_token_id": 1})
    texts = ["w5 w6 w7 w8", "w40 w41"]
    with lmopt.Runtime(model) as rt, lmopt.Runtime(written) as lm:
        found = rt.generate(texts, num_beams=4, num_return_sequences=4, max_new_tokens=5)
        expected = []
        for several in found:
            rows = [[1, *WORDS.encode(one.text)] for one in several]
            sums = [
                one.score * len(one.token_ids) + 30.0 * float(lm.score([row])[0].sum()) + 0.1 * (len(row) - 1)
                for one, row in zip(several, rows, strict=True)
            ]
            expected.append(several[int(np.argmax(sums))].text)
        asked = {"num_beams": 4, "max_new_tokens": 5}
        rescored = rt.translate(texts, **asked, opinion=Opinion(lm, 30.0, word_bonus=0.1))
        assert rescored == expected
        assert rescored != rt.translate(texts, **asked)
        fused = rt.generate(texts, **asked, fusion=Fusion(lm.engine, 0.5, 1))
        assert rt.translate(texts, **asked, opinion=Opinion(lm, 0.5, "fuse")) == [one.text for one in fused]
        assert rt.translate(texts[1], **asked, opinion=Opinion(lm, 0.5)) in {one.text for one in found[1]}
        with pytest.raises(UnsupportedOptionError, match="expected 'rescore', or 'fuse' without"):
            rt.translate(texts, opinion=Opinion(lm, 0.5, "fuse", word_bonus=0.1))
    with (
        lmopt.Runtime(model) as rt,
        lmopt.Runtime(lmopt.Model.from_module(writer)) as mute,
        pytest.raises(VocabularyMismatchError, match="another tokenizer"),
    ):
        rt.translate(texts, opinion=Opinion(mute, 0.5, "fuse"))


def test_decoders_do_neither() -> None:
    with lmopt.Runtime(lmopt.Model.from_module(tiny_gpt(), tokenizer=WORDS)) as rt:
        with pytest.raises(UnsupportedError, match="no encoder that reads text"):
            rt.translate("w5")
        with pytest.raises(UnsupportedOptionError, match="decoder_input_ids are for encoder-decoder"):
            rt.generate([5], decoder_input_ids=[3])


@pytest.mark.real_model
def test_whisper_says_what_transformers_says(whisper_tiny: Path, librivox: Path) -> None:
    names = (librivox / "fileids").read_text(encoding="utf-8").split()
    clips = [read_audio(librivox / f"{name}.wav", LogMel.sampling_rate) for name in names]
    model = lmopt.Model.from_pretrained(whisper_tiny)
    with lmopt.Runtime(model) as rt:
        found = rt.transcribe(clips)
        timed = rt.transcribe(clips, return_timestamps=True)
    expected, expected_times = [], []
    for clip in clips:
        features = torch.tensor(LogMel(80, 3000)(clip))[None]
        with torch.no_grad():
            ids = model.module.generate(features)[0]
            parts = model.module.generate(features, return_timestamps=True, return_segments=True)["segments"][
                0
            ]
        expected.append(model.tokenizer.decode(ids.tolist()).strip())
        spoken = [one for one in parts if model.tokenizer.decode(one["tokens"].tolist()).strip()]
        expected_times.append(
            [
                (round(float(one["start"]), 2), model.tokenizer.decode(one["tokens"].tolist()).strip())
                for one in spoken
            ]
        )
    assert found == expected
    assert [[(one.start_s, one.text) for one in several] for several in timed] == expected_times
    assert all(0 <= one.start_s < one.end_s <= 30 for several in timed for one in several)
    said = re.sub(
        r"\(.*|</?s>", "", (librivox / "transcription").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    # 3 of 71 words are wrong; one of them is a slip in what is said to be said.
    assert errors(words(said), words(" ".join(found))) == (3, 71)


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z ]", " ", text.lower().replace("mr.", "mister").replace("\n", " ")).split()


def errors(said: list[str], heard: list[str]) -> tuple[int, int]:
    """Count the least words to change, add or drop, and the words that were said."""
    row = list(range(len(heard) + 1))
    for place, word in enumerate(said, 1):
        above, row[0] = row.copy(), place
        for other, guess in enumerate(heard, 1):
            row[other] = min(above[other] + 1, row[other - 1] + 1, above[other - 1] + (word != guess))
    return row[-1], len(said)
