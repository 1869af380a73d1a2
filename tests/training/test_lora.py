"""Adapters: merged they are gone, and the weights hold what they learnt."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lmopt import Compressor, Model
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.compression import Quantize
from lmopt.errors import UnsupportedOptionError
from lmopt.testing.models import VOCAB_SIZE, tiny_gpt, tiny_llama
from lmopt.training.lora import adapters

IDS = torch.arange(40).reshape(2, 20) % VOCAB_SIZE


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = module(IDS)
    result: torch.Tensor = getattr(found, "logits", found[0] if isinstance(found, tuple) else found)
    return result


def stir(module: nn.Module) -> None:
    """Give every trained weight another value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in module.parameters():
            if one.requires_grad:
                one.add_(0.1 * torch.randn(one.shape, generator=generator))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt])
def test_a_merged_model_is_plain_and_computes_what_the_adapted_one_did(make: object) -> None:
    module = make()  # type: ignore[operator]
    before, kinds = copy.deepcopy(module), [type(one) for one in module.modules()]
    with adapters(module, VOCAB_SIZE, rank=2) as paths:
        trained = [name for name, one in module.named_parameters() if one.requires_grad]
        assert trained
        assert all("lora_" in name for name in trained)
        torch.testing.assert_close(logits(module), logits(before))
        stir(module)
        adapted = logits(module)
    assert [type(one) for one in module.modules()] == kinds
    assert list(module.state_dict()) == list(before.state_dict())
    torch.testing.assert_close(logits(module), adapted, rtol=1e-4, atol=1e-4)
    assert (logits(module) - logits(before)).abs().max() > 0.05
    changed = {
        name for name, one in module.named_parameters() if not torch.equal(one, before.get_parameter(name))
    }
    assert changed == {f"{path}.weight" for path in paths}
    assert not hasattr(module, "peft_config")


def test_of_a_quantized_model_the_merged_weights_are_on_its_own_grid() -> None:
    small = Compressor([Quantize(bits=4, group_size=32)]).compress(Model.from_module(tiny_llama()))
    module = copy.deepcopy(small.module)
    with adapters(module, VOCAB_SIZE, rank=2) as paths:
        stir(module)
        merged = {
            path: (part.base_layer.weight + part.get_delta_weight("default")).detach().clone()
            for path, part in module.named_modules()
            if path in paths
        }
    before, after = quantized_parts(small.module), quantized_parts(module)
    assert before.keys() == after.keys()
    assert merged.keys() < after.keys()
    for path, part in after.items():
        assert torch.equal(part.scales, before[path].scales)
        if path not in merged:
            assert torch.equal(part.codes, before[path].codes)
            continue
        assert not torch.equal(part.codes, before[path].codes)
        step = part.scales.abs().repeat_interleave(32, 1)[:, : part.grid.columns]
        codes = torch.round(merged[path] / part.scales.repeat_interleave(32, 1)[:, : part.grid.columns])
        inside = (codes >= -8) & (codes <= 7)
        assert ((part.weight - merged[path]).abs() <= 0.5001 * step)[inside].all()


def test_after_an_error_the_model_is_as_it_was() -> None:
    small = Compressor([Quantize(bits=4, group_size=32)]).compress(Model.from_module(tiny_llama()))
    module = copy.deepcopy(small.module)
    asked = [one.requires_grad for one in module.parameters()]

    class StopError(Exception):
        pass

    def fail() -> None:
        with adapters(module, VOCAB_SIZE, rank=2):
            stir(module)
            raise StopError

    with pytest.raises(StopError):
        fail()
    assert torch.equal(logits(module), logits(small.module))
    assert [type(one) for one in module.modules()] == [type(one) for one in small.module.modules()]
    assert [one.requires_grad for one in module.parameters()] == asked


@pytest.mark.parametrize("rank", [0, 1.5, True])
def test_impossible_ranks_are_refused(rank: object) -> None:
    with (
        pytest.raises(UnsupportedOptionError, match="lora_rank"),
        adapters(tiny_llama(), VOCAB_SIZE, rank=rank),
    ):  # type: ignore[arg-type]
        pass


def test_the_dequantized_weights_were_the_start() -> None:
    small = Compressor([Quantize(bits=4, group_size=32)]).compress(Model.from_module(tiny_llama()))
    module = copy.deepcopy(small.module)
    with adapters(module, VOCAB_SIZE, rank=2):
        torch.testing.assert_close(logits(module), logits(small.module))
    for path, part in quantized_parts(module).items():
        assert np.array_equal(part.array().values(), quantized_parts(small.module)[path].array().values())
