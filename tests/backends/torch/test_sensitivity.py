"""What rounding a weight is said to cost is what it costs; budgets are kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lmopt.backends.torch.calibration import readings
from lmopt.backends.torch.compressing import by_matrix
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.quantizing import find_weights
from lmopt.backends.torch.sensitivity import by_budget, predicted
from lmopt.compression import GPTQ, Mixed, Quantize
from lmopt.compression.step import Setting
from lmopt.errors import InputError, UnsupportedOptionError
from lmopt.testing.models import VOCAB_SIZE as VOCAB
from lmopt.testing.models import tiny_gpt, tiny_llama
from lmopt.testing.seq2seq import tiny_t5, tiny_whisper


def setting(count=48, width=48):
    return Setting(VOCAB, list(np.random.default_rng(0).integers(0, VOCAB, (count, width))))


def sharp(build):
    """A model that prefers some tokens, as trained ones do."""
    module = build()
    head = module.lm_head if hasattr(module, "lm_head") else module.head
    with torch.no_grad():
        head.weight.mul_(4)
    return module


def log_probabilities(module, rows):
    with torch.no_grad():
        result = module(torch.from_numpy(np.stack(rows)))
    return (result.logits if hasattr(result, "logits") else result[0]).double().log_softmax(-1)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt])
def test_the_prediction_is_the_divergence(build):
    module, used = sharp(build), setting()
    step = Mixed(Quantize(group_size=32, embedding=None, head=None), choices=(4, 8), average_bits=6)
    expected = log_probabilities(module, used.rows)
    pairs = []
    for one in predicted(module, step, used):
        alone = {path: {"bits": 4} for path in one.paths}
        others = {w.path: None for w in find_weights(module, VOCAB) if w.path not in alone}
        small = by_matrix(
            module, Quantize(4, 32, embedding=None, head=None, overrides={**others, **alone}), used
        )
        found = log_probabilities(small, used.rows)
        divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
        pairs.append((one.costs[0], divergence))
    told, real = np.log(np.array(pairs)).T
    assert len(pairs) >= 6
    assert np.abs(told - real).max() < np.log(3), "each within a factor of three"
    assert abs((told - real).mean()) < np.log(1.6)
    assert np.corrcoef(told, real)[0, 1] > 0.75


@pytest.mark.parametrize(
    ("build", "source", "least"),
    [
        (tiny_t5, lambda random: random.integers(4, VOCAB, 16), 0.95),
        # Errors at neighbours of a sound go together, which no prediction of single ones knows.
        (tiny_whisper, lambda random: random.normal(size=(8, 40)).astype(np.float32), 0.9),
    ],
)
def test_the_prediction_holds_on_both_sides_of_an_encoder_decoder(build, source, least):
    module, random = build(), np.random.default_rng(0)
    with torch.no_grad():
        module.get_output_embeddings().weight.mul_(0.5)
    rows = list(random.integers(4, VOCAB, (16, 24)))
    used = Setting(VOCAB, rows, sources=[source(random) for _ in rows])
    passes = readings(module, used, 1)

    def judged(one):
        with torch.no_grad():
            return torch.cat([each.logits(one)[0] for each in passes]).double().log_softmax(-1)

    expected = judged(module)
    step = Mixed(Quantize(group_size=32, embedding=None, head=None), choices=(4, 8), average_bits=6)
    pairs = []
    candidates = predicted(module, step, used)
    for one in candidates[::3]:
        alone = {path: {"bits": 4} for path in one.paths}
        others = {w.path: None for w in find_weights(module, VOCAB) if w.path not in alone}
        plain = Quantize(4, 32, embedding=None, head=None, overrides={**others, **alone})
        found = judged(by_matrix(module, plain, used))
        pairs.append((one.costs[0], float((expected.exp() * (expected - found)).sum(-1).mean())))
    told, real = np.log(np.array(pairs)).T
    assert abs((told - real).mean()) < np.log(2)
    assert np.corrcoef(told, real)[0, 1] > least
    # What all layers read of the encoder is one tensor, and each layer still has a width of its own.
    assert (
        len({one.paths for one in candidates if "k_proj" in str(one.paths) or ".k'" in str(one.paths)}) == 6
    )


@pytest.mark.parametrize("average", [4.6, 5.5, 7.0])
def test_the_budget_is_kept_and_used(average):
    module = tiny_llama()
    step = Mixed(GPTQ(group_size=32, embedding=4, head=4), average_bits=average, tokens=256)
    small = by_budget(module, step, setting())
    parts = {id(one.codes): one for one in quantized_parts(small).values()}.values()
    weights = sum(one.weight_count for one in parts)
    stored = 8 * sum(one.array().nbytes() - 2 * one.scales.numel() for one in parts)  # scales of 16 bits
    assert stored <= average * weights
    assert stored > (average - 0.5) * weights
    assert len({one.grid.bits for one in parts}) > 1


def test_group_sizes_are_chosen_too_and_costs_are_the_quantizers_own():
    module, used = tiny_llama(), setting()
    step = Mixed(GPTQ(group_size=16, embedding=None, head=None), choices=(3, 4), average_bits=4.8, tokens=256)
    groups = replace(step, group_sizes=(16, 32))
    small = by_budget(module, groups, used)
    assert {one.grid.group_size for one in quantized_parts(small).values()} == {16, 32}
    plain = predicted(module, replace(step, quantizer=Quantize(group_size=16)), used)
    for one, rounded in zip(predicted(module, step, used), plain, strict=True):
        assert one.paths == rounded.paths
        assert one.costs[0] < rounded.costs[0], "GPTQ's errors cost less than those of rounding"


def test_linears_that_read_one_tensor_get_one_width_and_overrides_stay():
    step = Mixed(
        Quantize(group_size=32, embedding=4, head=4, overrides={"*.1.mlp.down_proj": {"bits": 8}}),
        average_bits=6.0,
        tokens=256,
    )
    small = by_budget(tiny_llama(), step, setting())
    for layer in small.model.layers:
        attention = layer.self_attn
        assert len({one.grid.bits for one in (attention.q_proj, attention.k_proj, attention.v_proj)}) == 1
        assert layer.mlp.gate_proj.grid.bits == layer.mlp.up_proj.grid.bits
    assert small.model.layers[1].mlp.down_proj.grid.bits == 8


def test_the_module_is_only_looked_at():
    module = tiny_llama()
    module.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (one.clone(), one.requires_grad) for name, one in module.named_parameters()}
    by_budget(module, Mixed(Quantize(group_size=32, embedding=4, head=4), tokens=256), setting())
    for name, one in module.named_parameters():
        assert torch.equal(one, before[name][0])
        assert one.requires_grad == before[name][1]
        assert one.grad is None


def test_what_cannot_be():
    with pytest.raises(UnsupportedOptionError, match="budget"):
        by_budget(tiny_llama(), Mixed(Quantize(group_size=8), average_bits=4.0, tokens=256), setting())
    with pytest.raises(InputError, match="calibration"):
        by_budget(tiny_llama(), Mixed(), Setting(VOCAB))
