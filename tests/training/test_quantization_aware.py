"""Training on a checkpoint's own grid: what is read, what flows back, and what is left."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lmopt import Compressor, Model, Runtime
from lmopt.backends.torch.quantized import QuantizedEmbedding, QuantizedLinear, quantized_parts
from lmopt.compression import Quantize
from lmopt.compression.layout import Grid, QuantizedArray, pack
from lmopt.testing.models import VOCAB_SIZE, tiny_llama
from lmopt.training.quantization_aware import StraightThrough, close_grid, open_grid, round_on
from lmopt.training.recovering import recover
from lmopt.training.steps import Distill

ZEROS = ["symmetric", "integer", "offset"]
IDS = torch.arange(40).reshape(2, 20) % VOCAB_SIZE


def part(zero: str, *, bits: int = 3, columns: int = 20, seed: int = 0) -> QuantizedLinear:
    """A part with every code, negative scales, a group of zeros, and a last group that is not full."""
    random = np.random.default_rng(seed)
    grid = Grid(6, columns, bits, 8, zero)
    codes = random.integers(0, 2**bits, (6, grid.groups, 8)).astype(np.uint8)
    scales = random.normal(size=(6, grid.groups)).astype(np.float32)
    scales[2, 1] = 0
    given = {
        "symmetric": {},
        "integer": {"zero_points": random.integers(0, 2**bits, (6, grid.groups)).astype(np.uint8)},
        "offset": {"offsets": random.normal(size=(6, grid.groups)).astype(np.float32)},
    }[zero]
    return QuantizedLinear(QuantizedArray(grid, pack(codes, grid), scales, **given))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", ZEROS)
def test_it_begins_as_the_part_bit_by_bit(zero: str, bits: int) -> None:
    before = part(zero, bits=bits)
    weight = StraightThrough(before, learn_scales=False)
    assert torch.equal(weight(), before.weight)
    after = weight.array()
    assert np.array_equal(after.values(), before.array().values())
    assert after.grid == before.grid


@pytest.mark.parametrize("zero", ZEROS)
def test_what_is_read_while_training_is_what_is_stored(zero: str) -> None:
    weight = StraightThrough(part(zero), learn_scales=True)
    with torch.no_grad():
        weight.master.add_(torch.randn(weight.master.shape, generator=torch.Generator().manual_seed(1)))
        weight.scales.mul_(1.3)
    read = weight().detach().numpy()
    assert np.array_equal(read, weight.array().values())
    assert not np.array_equal(read, part(zero).array().values())


def test_a_weight_goes_to_the_nearest_value_of_its_grid() -> None:
    before = part("integer")
    wanted = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    found = torch.from_numpy(round_on(before, wanted).values())
    codes = torch.arange(8.0)
    for row in range(6):
        for column in range(20):
            group = column // 8
            values = before.scales[row, group] * (codes - float(before.zero_points[row, group]))
            best = (values - wanted[row, column]).abs().min()
            assert abs((found[row, column] - wanted[row, column]).abs() - best) < 1e-6


def test_gradients_pass_the_rounding_and_stop_off_the_grid() -> None:
    weight = StraightThrough(part("symmetric"), learn_scales=False)
    with torch.no_grad():
        weight.master[0, 0] = 100.0
        weight.master[1, 3] += 0.1 * weight.scales[1, 0]
    above = torch.randn(6, 20, generator=torch.Generator().manual_seed(3))
    (weight() * above).sum().backward()
    expected = above.clone()
    expected[0, 0] = 0
    expected[2, 8:16] = 0  # the group without a scale
    assert weight.master.grad is not None
    torch.testing.assert_close(weight.master.grad, expected)
    assert not weight.scales.requires_grad


def test_scales_get_the_gradient_of_learned_step_sizes() -> None:
    weight = StraightThrough(part("symmetric"), learn_scales=True)
    with torch.no_grad():
        weight.master.add_(0.3 * torch.randn(6, 20, generator=torch.Generator().manual_seed(4)))
    above = torch.randn(6, 20, generator=torch.Generator().manual_seed(5))
    (weight() * above).sum().backward()
    # Esser et al. 2020, equation 3: round(w / s) - w / s inside the grid, its end outside.
    scales = weight.scales.detach().repeat_interleave(8, 1)[:, :20]
    steps = weight.master.detach() / scales
    slope = torch.where(
        (steps.round() >= -4) & (steps.round() <= 3), steps.round() - steps, steps.round().clamp(-4, 3)
    )
    expected = torch.zeros(6, 24)
    expected[:, :20] = torch.where(scales == 0, 0, slope * above)
    found = weight.scales.grad
    assert found is not None
    whole = scales[:, ::8] != 0
    torch.testing.assert_close(
        found[whole], expected.unflatten(1, (3, 8)).sum(-1)[whole], rtol=1e-4, atol=1e-5
    )


def test_scales_that_fit_into_16_bits_still_do_when_learnt() -> None:
    before = part("symmetric")
    before.scales.copy_(before.scales.half().float())
    weight = StraightThrough(before, learn_scales=True)
    with torch.no_grad():
        weight.scales.mul_(1.2345)
    stored = weight.array()
    assert np.array_equal(stored.scales, stored.scales.astype(np.float16).astype(np.float32))
    assert np.array_equal(weight().detach().numpy(), stored.values())
    assert not np.array_equal(stored.scales, before.scales.numpy())


def tied() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ).eval()


@pytest.mark.parametrize("activations", [None, 8])
def test_a_model_is_opened_and_closed_unchanged(activations: int | None) -> None:
    small = Compressor([Quantize(bits=4, group_size=16, activations=activations)]).compress(
        Model.from_module(tied())
    )
    module = copy.deepcopy(small.module)
    with torch.no_grad():
        before = small.module(input_ids=IDS).logits
        paths = open_grid(module)
        assert len(paths) == len(quantized_parts(small.module)) == 16
        assert not quantized_parts(module)
        # Rounded activations are multiplied block by block in the one and at once in the other.
        torch.testing.assert_close(module(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)
        head, embedding = module.lm_head, module.model.embed_tokens
        assert head.rounded is embedding.rounded
        close_grid(module)
        assert torch.equal(module(input_ids=IDS).logits, before)
    assert module.lm_head.codes.data_ptr() == module.model.embed_tokens.codes.data_ptr()
    assert isinstance(module.model.embed_tokens, QuantizedEmbedding)
    assert not any(
        one.requires_grad for part in quantized_parts(module).values() for one in part.parameters()
    )


@pytest.mark.parametrize("learn_scales", [False, True])
def test_recovery_leaves_a_better_checkpoint_of_the_same_layout(tmp_path: Path, learn_scales: bool) -> None:
    model = Model.from_module(tiny_llama())
    small = Compressor([Quantize(bits=3, group_size=32, embedding=4, head=4)]).compress(model)
    data = [np.random.default_rng(0).integers(0, VOCAB_SIZE, 4000)]
    step = Distill(max_steps=100, learning_rate=3e-3, block_size=32, learn_scales=learn_scales)
    result = recover(small, model, step, data=data)
    before, after = quantized_parts(small.module), quantized_parts(result.model.module)
    assert {path: one.grid for path, one in before.items()} == {path: one.grid for path, one in after.items()}
    assert (
        all(torch.equal(before[path].scales, one.scales) for path, one in after.items()) is not learn_scales
    )
    assert any(not torch.equal(before[path].codes, one.codes) for path, one in after.items())

    def distance(one: Model) -> float:
        p, q = (each.module(input_ids=IDS).logits.log_softmax(-1) for each in (model, one))
        return float((p.exp() * (p - q)).sum(-1).mean())

    with torch.no_grad():
        assert distance(result.model) < 0.6 * distance(small)
    # Every engine reads the same values from the folder.
    folder = result.model.save_pretrained(tmp_path / "out").path
    read = quantized_parts(Model.from_pretrained(folder).module)
    for path, one in after.items():
        assert np.array_equal(read[path].array().values(), one.array().values())
        assert torch.equal(one.weight, torch.from_numpy(one.array().values()))
    ids = IDS[:1].numpy()
    with (
        Runtime(folder, backend="torch") as torch_engine,
        Runtime(folder, backend="onnxruntime") as onnx_engine,
    ):
        ours, theirs = torch_engine.logits(ids), onnx_engine.logits(ids)
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() < 1e-3
