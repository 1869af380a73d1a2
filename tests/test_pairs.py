"""Encoder-decoders are compressed by steps that need no texts, and measured on pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lmopt
from lmopt.compression import GPTQ, HQQ, Magnitude, Quantize
from lmopt.compressor import Compressor, compare_models
from lmopt.errors import InputError, UnsupportedError
from lmopt.testing.models import tiny_gpt
from lmopt.testing.seq2seq import tiny_bart, tiny_t5, tiny_whisper

SOURCES = [[5, 6, 7, 8, 1], [9, 10, 1]]


@pytest.mark.parametrize("step", [Quantize(8, 16), HQQ(4, 16), Magnitude(0.3)], ids=lambda one: one.name)
def test_the_loss_is_that_of_the_decoder_after_its_sources(step) -> None:
    model = lmopt.Model.from_module(tiny_t5())
    small = Compressor([step]).compress(model, sources=SOURCES)
    report = small.report
    # By hand: the original's own greedy texts, read by both.
    with lmopt.Runtime(model) as rt, lmopt.Runtime(small, dtype="auto") as other:
        start = model.facts.source.start_token_id
        rows = [[start, *one.token_ids] for one in rt.generate(SOURCES, max_new_tokens=48)]
        kl, positions = 0.0, 0
        for row, source in zip(rows, SOURCES, strict=True):
            one, two = (
                torch.tensor(each.logits(row, sources=source)).double().log_softmax(-1)
                for each in (rt, other)
            )
            kl += float((one.exp() * (one - two)).sum())
            positions += len(row)
    assert report.tokens == positions
    assert report.difference.kl_mean == pytest.approx(kl / positions, rel=0.02, abs=1e-7)
    assert report.difference.kl_mean > 1e-9
    if step.name != "magnitude":
        assert report.bytes < report.float_bytes


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart, tiny_whisper])
def test_a_compressed_one_is_saved_and_exported(build, tmp_path: Path) -> None:
    model = lmopt.Model.from_module(build())
    small = Compressor([Quantize(8, 16)]).compress(model)
    small.save_pretrained(tmp_path / "small")
    again = lmopt.Model.from_pretrained(tmp_path / "small")
    assert again.fingerprint() == small.fingerprint()
    lmopt.Exporter("onnx").export(again, tmp_path / "onnx")
    facts = model.facts.source
    source = (
        np.random.default_rng(1).normal(size=(facts.size, facts.length)).astype(np.float32)
        if facts.kind == "features"
        else np.array(SOURCES[0])
    )
    found = []
    for place, backend in ((small, "torch"), (tmp_path / "onnx", "onnxruntime")):
        with lmopt.Runtime(place, backend=backend) as rt:
            found.append(rt.generate(source, max_new_tokens=12, num_beams=2).token_ids)
    assert found[0] == found[1]


def test_what_cannot_be_measured_or_done_is_refused() -> None:
    model = lmopt.Model.from_module(tiny_t5())
    with pytest.raises(UnsupportedError, match="step 'gptq' needs that"):
        Compressor([GPTQ(bits=4, group_size=16)]).compress(model, sources=SOURCES)
    with pytest.raises(UnsupportedError, match="leave calibration out"):
        Compressor([Quantize(8, 16)]).compress(model, calibration=["a text"])
    with pytest.raises(InputError, match="1 texts and 2 sources"):
        compare_models(model, model, sources=SOURCES, texts=["w5"])
    with pytest.raises(InputError, match="1 texts and no sources"):
        compare_models(model, model, texts=["w5"])
    with pytest.raises(InputError, match="no tokenizer"):
        compare_models(model, model, sources=["w5"])
    with pytest.raises(UnsupportedError, match="has no encoder; leave sources out"):
        Compressor([Quantize(8, 16)]).compress(lmopt.Model.from_module(tiny_gpt()), sources=SOURCES)
