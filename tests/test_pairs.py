"""Encoder-decoders are compressed by steps that read nothing or pairs, and measured on pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lmopt
from lmopt.backends.torch.calibration import stages
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.compression import (
    AWQ,
    GPTQ,
    HQQ,
    Calibration,
    Cast,
    DropBlocks,
    Magnitude,
    Mixed,
    PruneChannels,
    PruneHeads,
    Quantize,
    SmoothQuant,
    SparseGPT,
)
from lmopt.compression.step import Setting
from lmopt.compressor import Compressor, compare_models
from lmopt.errors import InputError, UnsupportedError, UnsupportedOptionError
from lmopt.pairs import pairs
from lmopt.testing.models import tiny_gpt
from lmopt.testing.seq2seq import tiny_bart, tiny_t5, tiny_whisper
from lmopt.types import SourceFacts

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


@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (tiny_t5, [PruneChannels(0.25), SmoothQuant(group_size=16, activations=None)]),
        pytest.param(
            tiny_bart,
            [
                PruneChannels(0.25),
                Mixed(Quantize(group_size=16), average_bits=8, choices=(6, 8), tokens=64),
            ],
            marks=pytest.mark.sweep,
        ),
        (tiny_whisper, [PruneChannels(0.25, uniform=False), AWQ(8, 16, n_grid=2)]),
    ],
)
def test_a_compressed_one_is_saved_and_exported(build, steps, tmp_path: Path) -> None:
    model = lmopt.Model.from_module(build())
    calibration = Calibration(None, sources=many_sources(model.facts.source)[:8])
    small = Compressor(steps).compress(model, calibration=calibration)
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


def many_sources(facts: SourceFacts) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    if facts.kind == "features":
        return [random.normal(size=(facts.size, facts.length)).astype(np.float32) for _ in range(12)]
    return [random.integers(4, facts.size, size) for size in range(6, 30)]


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart, tiny_whisper])
def test_what_linears_read_after_sources_is_what_they_read_in_the_model(build) -> None:
    model = lmopt.Model.from_module(build())
    facts = model.facts.source
    sources, rows = pairs(model, many_sources(facts), None)
    wanted = [path for path, part in model.module.named_modules() if type(part) is nn.Linear]
    seen: dict[str, list[np.ndarray]] = {path: [] for path in wanted}
    hooks = [
        model.module.get_submodule(path).register_forward_pre_hook(
            lambda part, args, path=path: seen[path].append(args[0].flatten(0, -2).double().numpy())
        )
        for path in wanted
    ]
    with torch.no_grad():
        for source, row in zip(sources, rows, strict=True):
            name = "input_features" if facts.kind == "features" else "input_ids"
            model.module(**{name: torch.tensor(source)[None]}, decoder_input_ids=torch.tensor(row)[None])
    for hook in hooks:
        hook.remove()
    setting = Setting(model.facts.vocab_size, rows, current=model, sources=sources)
    found = {}
    for stage in stages(model.module, setting, wanted):
        found |= stage.statistics
    assert any(path.startswith("encoder.") or ".encoder." in path for path in found)
    assert any("decoder." in path for path in found)
    assert found.keys() == {path for path in wanted if seen[path]}
    for path, one in found.items():
        x = np.concatenate(seen[path])
        assert one.tokens == len(x), path
        assert np.allclose(one.gram, x.T @ x / len(x), rtol=1e-3, atol=1e-5), path


@pytest.mark.parametrize("build", [tiny_t5, tiny_whisper])
def test_a_step_that_reads_loses_less_than_one_that_does_not(build) -> None:
    model = lmopt.Model.from_module(build())
    given = many_sources(model.facts.source)
    judged = {"sources": given[1::2]}
    losses = []
    for step, calibration in (
        (Quantize(3, 16), None),
        (GPTQ(3, 16), Calibration(None, sources=given[::2])),
        (Magnitude(0.5), None),
        (SparseGPT(0.5), Calibration(None, sources=given[::2])),
        (PruneChannels(0.25, score="weight", refit=False), None),
        (PruneChannels(0.25), Calibration(None, sources=given[::2])),
    ):
        small = Compressor([step]).compress(model, calibration=calibration, **judged)
        losses.append(small.report.difference.kl_mean)
    assert losses[1] < 0.8 * losses[0]
    assert losses[3] < 0.8 * losses[2]
    assert losses[5] < 0.8 * losses[4]


@pytest.mark.parametrize(
    ("build", "reading", "plain"),
    [
        (tiny_whisper, AWQ(4, 32, n_grid=8), Quantize(4, 32)),
        (tiny_t5, SmoothQuant(group_size=32), Quantize(8, 32, activations=8)),
        (tiny_t5, Mixed(Quantize(group_size=16), average_bits=5.3, tokens=256), Quantize(4, 16)),
    ],
)
def test_scales_and_chosen_widths_lose_less_than_rounding(build, reading, plain) -> None:
    model = lmopt.Model.from_module(build())
    given = many_sources(model.facts.source)
    if isinstance(reading, Mixed):
        # Greedy texts of a drawn model are certain: without this, a few tokens would be most of the loss.
        model.module.lm_head.weight.data.mul_(0.5)
    else:
        # Some inputs far larger than the others, as trained models have.
        loud = [part for path, part in model.module.named_modules() if path.endswith("layer_norm")]
        with torch.no_grad():
            for part in loud[:-1]:
                part.weight[:2] *= 30
    found = []
    for step, calibration in ((plain, None), (reading, Calibration(None, sources=given[::2]))):
        small = Compressor([step]).compress(model, calibration=calibration, sources=given[1::2])
        bits = {one.grid.bits for one in quantized_parts(small.module).values()}
        found.append((small.report.difference.kl_mean, small.report.bytes, bits))
    assert found[1][0] < 0.8 * found[0][0]
    assert found[1][1] <= found[0][1]
    assert len(found[1][2]) > (2 if isinstance(reading, Mixed) else 0)


def test_a_cast_beside_a_step_that_reads_sees_pairs_too() -> None:
    model = lmopt.Model.from_module(tiny_t5())
    calibration = Calibration(None, sources=many_sources(model.facts.source))
    plain = Compressor([Magnitude(0.2), Cast("bfloat16")]).compress(model)
    read = Compressor([SparseGPT(0.2), Cast("bfloat16")]).compress(model, calibration=calibration)
    for small in (plain, read):
        assert {one.dtype for one in small.module.parameters()} >= {torch.bfloat16}


def test_what_cannot_be_measured_or_done_is_refused() -> None:
    model = lmopt.Model.from_module(tiny_t5())
    with pytest.raises(UnsupportedOptionError, match="2 sources and 1 texts"):
        Calibration(["a"], sources=SOURCES)
    with pytest.raises(UnsupportedOptionError, match="sources is a single string"):
        Calibration(None, sources="a text")
    with pytest.raises(UnsupportedError, match="has no encoder; leave sources out"):
        Compressor([GPTQ(4, 16)]).compress(
            lmopt.Model.from_module(tiny_gpt()), calibration=Calibration(None, sources=SOURCES)
        )
    for calibration in (None, ["a text"], Calibration(None)):
        with pytest.raises(
            InputError, match=r"step 'gptq' must see .* read: give compress\(model, calibration=Cal"
        ):
            Compressor([GPTQ(bits=4, group_size=16)]).compress(model, calibration=calibration)
    with pytest.raises(InputError, match=r"after the calibration sources stand .* at least 256 are needed"):
        Compressor([GPTQ(bits=4, group_size=16)]).compress(
            model, calibration=Calibration(None, sources=SOURCES[:1])
        )
    with pytest.raises(UnsupportedError, match="step 'drop_blocks' does not take encoder-decoders"):
        Compressor([DropBlocks(count=1)]).compress(model, calibration=Calibration(None, sources=SOURCES))
    heads = PruneHeads(0.5, score="weight", refit=False)
    with pytest.raises(UnsupportedError, match="no configuration says that heads are gone"):
        Compressor([heads]).compress(model)
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
