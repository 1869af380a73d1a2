"""`lmopt translate` and `lmopt transcribe` on tiny models."""

import json
import sys
import wave
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import lmopt
from lmopt.applications import Opinion
from lmopt.testing.seq2seq import VOCAB_SIZE, tiny_t5, tiny_whisper


def saved(module: Any, folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    module.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def test_translate(tmp_path: Path, call: Any) -> None:
    folder = saved(tiny_t5(), tmp_path / "t5")
    texts = ["w5 w6 w7", "w8"]
    with lmopt.Runtime(folder) as rt:
        expected = rt.translate(texts, max_new_tokens=6)
        beams = rt.translate(texts[1], max_new_tokens=6, num_beams=3)
    done = call("translate", folder, *texts, "--set", "max_new_tokens=6")
    assert done.status == 0, done.stderr
    assert done.stdout.splitlines() == expected
    done = call("translate", folder, texts[1], "--set", "max_new_tokens=6", "--num-beams", "3", "--json")
    assert done.data["texts"] == [beams]


def test_a_language_model_is_asked(tmp_path: Path, call: Any) -> None:
    folder = saved(tiny_t5(), tmp_path / "t5")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        writer = saved(LlamaForCausalLM(config).eval(), tmp_path / "llama")
    with lmopt.Runtime(folder) as rt, lmopt.Runtime(writer) as lm:
        expected = rt.translate("w5 w6", max_new_tokens=4, opinion=Opinion(lm, 60.0, word_bonus=1.0))
        fused = rt.translate("w5 w6", max_new_tokens=4, num_beams=2, opinion=Opinion(lm, 60.0, "fuse"))
        plain = rt.translate("w5 w6", max_new_tokens=4, num_beams=2)
    assert fused != plain
    asked = (
        "translate",
        folder,
        "w5 w6",
        "--set",
        "max_new_tokens=4",
        "--language-model",
        writer,
        "--lm-weight",
        "60",
    )
    done = call(*asked, "--word-bonus", "1")
    assert done.status == 0, done.stderr
    assert done.stdout.splitlines() == [expected]
    done = call(*asked, "--lm-method", "fuse", "--num-beams", "2")
    assert done.stdout.splitlines() == [fused]


def test_transcribe(tmp_path: Path, call: Any) -> None:
    folder = saved(tiny_whisper(), tmp_path / "whisper")
    sound = tmp_path / "a.wav"
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((np.sin(np.arange(6000) / 9) * 20000).astype("<i2").tobytes())
    with lmopt.Runtime(folder) as rt:
        expected = rt.transcribe([sound, str(sound)])
    done = call("transcribe", folder, sound, sound)
    assert done.status == 0, done.stderr
    assert done.stdout.splitlines() == expected
    assert expected[0]
    settings = folder / "generation_config.json"
    told = json.loads(settings.read_text()) | {"no_timestamps_token_id": 80}
    # transformers would write it anew from the config otherwise.
    del told["_from_model_config"]
    settings.write_text(json.dumps(told))
    with lmopt.Runtime(folder) as rt:
        stretches = rt.transcribe(sound, return_timestamps=True)
    done = call("transcribe", folder, sound, "--timestamps", "--json")
    assert done.status == 0, done.stderr
    assert done.data["segments"] == [[asdict(one) for one in stretches]]
    first = stretches[0]
    assert done.data["texts"][0].startswith(f"[{first.start_s:.2f} -> {first.end_s:.2f}] {first.text}")
    done = call("transcribe", folder, tmp_path / "none.wav")
    assert done.status == 2
    assert "there is no sound file at" in done.stderr
    done = call("translate", folder, "w5")
    assert done.status == 2
    assert "no encoder that reads text" in done.stderr


def test_pairs_are_judged_before_and_after_compression(tmp_path: Path, call: Any) -> None:
    folder = saved(tiny_t5(), tmp_path / "t5")
    pairs = tmp_path / "pairs.jsonl"
    with lmopt.Runtime(folder) as rt:
        texts = ["w5 w6 w7", "w8 w9"]
        right = rt.translate(texts)
    lines = [json.dumps({"source": a, "text": b}) for a, b in zip(texts, right, strict=True)]
    pairs.write_text("\n".join(lines))
    done = call("eval", folder, "--pairs", pairs, "--json")
    assert done.status == 0, done.stderr
    assert done.data["metrics"]["chrf"] == 100
    asked = (
        "compress",
        folder,
        tmp_path / "out",
        "--recipe",
        "rtn",
        "--set",
        "bits=3",
        "--set",
        "group_size=8",
    )
    done = call(*asked, "--pairs", pairs, "--json")
    assert done.status == 0, done.stderr
    assert f"lmopt translate {tmp_path / 'out'}" in done.stderr
    written = done.data["written"]
    assert written["before"]["texts"] == right
    assert written["before"]["metrics"]["chrf"] == 100
    with lmopt.Runtime(tmp_path / "out") as rt:
        assert written["after"]["texts"] == rt.translate(texts)
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(lines * 60))
    read = call(
        "compress", folder, tmp_path / "gptq", "--recipe", "gptq", "--set", "bits=3", "--set", "group_size=8",
        "--calibration", many, "--json",
    )  # fmt: skip
    assert read.status == 0, read.stderr
    assert read.data["recipe"][0]["step"] == "gptq"
    # What judges is looked for before the work, not after it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sacrebleu", None)
        done = call(*asked[:2], tmp_path / "unjudged", *asked[3:], "--pairs", pairs)
        assert done.status == 2
        assert "this needs sacrebleu" in done.stderr
        assert not (tmp_path / "unjudged").exists()
        assert "this needs sacrebleu" in call("eval", folder, "--pairs", pairs).stderr
    done = call("eval", folder, "--pairs", pairs, "--text", pairs)
    assert done.status == 2
