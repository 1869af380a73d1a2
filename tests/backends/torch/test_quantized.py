"""Quantized parts in a module: values, ties, moves, files, and what corrupt files say."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lmopt
from lmopt.backends.torch.compressing import by_matrix
from lmopt.backends.torch.quantized import QuantizedEmbedding, QuantizedLinear, quantized_parts
from lmopt.backends.torch.quantizing import describe, find_weights, stored_bytes
from lmopt.compression import HQQ, Quantize
from lmopt.compression.layout import BITS, Grid, QuantizedArray, pack, quantize
from lmopt.compression.step import Setting
from lmopt.errors import CorruptArtifactError, UnsupportedError, UnsupportedOptionError
from lmopt.testing.models import tiny_gpt, tiny_llama


def random_array(bits: int, zero: str, rows: int = 24, columns: int = 64, seed: int = 0) -> QuantizedArray:
    random = np.random.default_rng(seed)
    grid = Grid(rows, columns, bits, 32, zero)
    codes = random.integers(0, 2**bits, (rows, grid.groups, 32), dtype=np.uint8)
    shape = (rows, grid.groups)
    return QuantizedArray(
        grid,
        pack(codes, grid),
        random.random(shape, np.float32).astype(np.float16).astype(np.float32) + np.float32(0.01),
        random.integers(0, 2**bits, shape, dtype=np.uint8) if zero == "integer" else None,
        random.standard_normal(shape).astype(np.float16).astype(np.float32) if zero == "offset" else None,
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero", ["symmetric", "integer", "offset"])
@pytest.mark.parametrize("columns", [64, 50])
def test_torch_and_numpy_hold_the_same_values(bits: int, zero: str, columns: int) -> None:
    array = random_array(bits, zero, columns=columns)
    part = QuantizedLinear(array, torch.arange(24.0))
    assert np.array_equal(part.weight.numpy(), array.values())
    x = torch.randn(2, 3, columns)
    assert torch.equal(
        part(x), torch.nn.functional.linear(x, torch.from_numpy(array.values()), torch.arange(24.0))
    )
    table = QuantizedEmbedding(array)
    assert torch.equal(table(torch.tensor([[3, 0]])), torch.from_numpy(array.values()[[[3, 0]]]))


def test_a_weight_keeps_its_values_in_every_dtype() -> None:
    part = QuantizedLinear(random_array(4, "offset"))
    before = part.weight.clone()
    half = copy.deepcopy(part).to(torch.bfloat16)
    assert half.scales.dtype == torch.float32
    assert torch.equal(half.weight, before)
    assert half(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert QuantizedEmbedding(random_array(4, "offset")).half()(torch.tensor([1])).dtype == torch.float16


def test_a_changed_weight_is_seen() -> None:
    part = QuantizedLinear(random_array(8, "symmetric"))
    before = part.weight.clone()
    part.scales.mul_(2)
    assert torch.equal(part.weight, before * 2)


@pytest.fixture(scope="module")
def model() -> lmopt.Model:
    return lmopt.Model.from_module(tiny_llama())


@pytest.fixture(scope="module")
def small(model: lmopt.Model) -> lmopt.Model:
    step = Quantize(bits=4, group_size=32, symmetric=False)
    return model.with_module(
        by_matrix(model.module, step, Setting(model.facts.vocab_size)), recipe=[step.to_dict()]
    )


def test_the_original_is_left_alone(model: lmopt.Model) -> None:
    before = model.fingerprint()
    by_matrix(model.module, Quantize(), Setting(model.facts.vocab_size))
    assert model.fingerprint() == before
    assert not quantized_parts(model.module)


def test_all_linears_and_the_embedding_become_quantized(model: lmopt.Model, small: lmopt.Model) -> None:
    weights = find_weights(model.module, model.facts.vocab_size)
    assert [one.path for one in weights] == list(
        dict(small.module.named_modules())
        and [
            path
            for path, part in small.module.named_modules()
            if isinstance(part, QuantizedLinear | QuantizedEmbedding)
        ]
    )
    assert stored_bytes(small.module) < 0.5 * stored_bytes(model.module)
    original = model.module.state_dict()
    for path, part in quantized_parts(small.module).items():
        bits = part.grid.bits
        expected = quantize(original[f"{path}.weight"].numpy(), bits, 32, symmetric=False, half=True).values()
        assert np.array_equal(part.weight.numpy(), expected)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    module = tiny_llama()
    module.lm_head.weight = module.model.embed_tokens.weight
    module.config.tie_word_embeddings = True
    vocab = module.config.vocab_size
    small = by_matrix(module, Quantize(), Setting(vocab))
    assert small.lm_head.codes.data_ptr() == small.model.embed_tokens.codes.data_ptr()
    assert small.lm_head.weight.data_ptr() == small.model.embed_tokens.weight.data_ptr()
    with pytest.raises(UnsupportedOptionError, match="one weight"):
        by_matrix(module, Quantize(head=None), Setting(vocab))
    model = lmopt.Model.from_module(module).with_module(small)
    model.save_pretrained(tmp_path / "m")
    back = lmopt.Model.from_pretrained(tmp_path / "m")
    assert back.module.lm_head.codes.data_ptr() == back.module.model.embed_tokens.codes.data_ptr()
    assert back.fingerprint() == model.fingerprint()


def test_a_folder_brings_back_the_same_model(small: lmopt.Model, tmp_path: Path) -> None:
    artifact = small.save_pretrained(tmp_path / "m")
    stated = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert stated == describe(small.module)
    back = lmopt.Model.from_pretrained(tmp_path / "m")
    assert back.fingerprint() == small.fingerprint()
    assert back.facts == small.facts
    assert back.recipe == small.recipe
    assert artifact.manifest["recipe"] == {"steps": list(small.recipe)}
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(back.module(ids).logits, small.module(ids).logits)


def test_an_own_module_comes_back_by_its_class(tmp_path: Path) -> None:
    model = lmopt.Model.from_module(tiny_gpt(seed=1))
    small = model.with_module(
        by_matrix(model.module, Quantize(group_size=16), Setting(model.facts.vocab_size))
    )
    small.save_pretrained(tmp_path / "m")
    back = lmopt.Model.from_module(tiny_gpt(seed=2)).load_weights(tmp_path / "m")
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        for ours, theirs in zip(
            torch.utils._pytree.tree_leaves(back.module(ids)),
            torch.utils._pytree.tree_leaves(small.module(ids)),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_the_fingerprint_tells_forms_apart() -> None:
    codes = np.zeros((4, 2, 16), np.uint8)
    one = QuantizedLinear(QuantizedArray(Grid(4, 64, 4, 32), codes, np.ones((4, 2), np.float32)))
    two = QuantizedLinear(QuantizedArray(Grid(4, 32, 8, 16), codes, np.ones((4, 2), np.float32)))
    from lmopt.backends.torch.saving import fingerprint

    assert fingerprint(torch.nn.Sequential(one), {}) != fingerprint(torch.nn.Sequential(two), {})


def _config(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return damage


def _tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


_Q = "model.layers.0.self_attn.q_proj"
_FAULTS = {
    "a part is not described": (_config(lambda c: c["parts"].pop(_Q)), "missing: .*q_proj.weight"),
    "a part is unknown": (_config(lambda c: c["parts"].update({"ghost": c["parts"][_Q]})), "ghost"),
    "a size is absent": (_config(lambda c: c["parts"][_Q].pop("bits")), "lacks 'bits'"),
    "a size is text": (_config(lambda c: c["parts"][_Q].update(bits="4")), "whole numbers"),
    "a size is another": (_config(lambda c: c["parts"][_Q].update(rows=7)), "needs uint8 of shape"),
    "a form is impossible": (_config(lambda c: c["parts"][_Q].update(zero="none")), "impossible"),
    "tied to nothing": (_config(lambda c: c["parts"][_Q].update(tied_to="ghost")), "described nowhere"),
    "no parts": (_config(lambda c: c.pop("parts")), "must map parts"),
    "codes are gone": (_tensors(lambda t: t.pop(f"{_Q}.codes")), "has no codes"),
    "a scale is NaN": (_tensors(lambda t: t[f"{_Q}.scales"].fill_(torch.nan)), "NaN"),
    "scales are doubles": (
        _tensors(lambda t: t.update({f"{_Q}.scales": t[f"{_Q}.scales"].double()})),
        "float64",
    ),
    "a norm is gone": (_tensors(lambda t: t.pop("model.norm.weight")), "missing: model.norm.weight"),
    "something is left over": (
        _tensors(lambda t: t.update(more=torch.ones(1))),
        "not part of the model: more",
    ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_damaged_folders_are_refused(fault: str, small: lmopt.Model, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "whole")
    folder = tmp_path / "damaged"
    shutil.copytree(tmp_path / "whole", folder)
    (folder / "lmopt.json").unlink()  # its hashes would find out first
    damage, told = _FAULTS[fault]
    damage(folder)
    with pytest.raises(CorruptArtifactError, match=told):
        lmopt.Model.from_pretrained(folder)


def test_a_newer_version_is_told(small: lmopt.Model, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "lmopt.json").unlink()
    _config(lambda c: c.update(version=2))(tmp_path / "m")
    with pytest.raises(UnsupportedError, match="version 2"):
        lmopt.Model.from_pretrained(tmp_path / "m")


@pytest.mark.real_model
def test_a_gguf_grid_is_carried_over_bit_by_bit(smollm2_gguf: Path, smollm2: Path) -> None:
    kept = lmopt.Model.from_pretrained(smollm2_gguf, keep_quantization=True)
    parts = quantized_parts(kept.module)
    state = lmopt.Model.from_pretrained(smollm2).module.state_dict()
    assert len(parts) == 212
    assert {part.grid.zero for part in parts.values()} == {"offset", "symmetric"}
    for path, part in parts.items():
        assert torch.equal(part.weight, state[f"{path}.weight"]), path
    assert stored_bytes(kept.module) < 112e6


def test_only_gguf_files_have_a_quantization_to_keep(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match=r"\.gguf"):
        lmopt.Model.from_pretrained(tmp_path, keep_quantization=True)


@pytest.mark.parametrize(("scale_bits", "stored"), [(16, torch.float16), (32, torch.float32)])
@pytest.mark.parametrize("step", [Quantize, HQQ])
def test_files_hold_scales_in_16_bits_where_that_is_exact(
    step: type, scale_bits: int, stored: torch.dtype, model: lmopt.Model, tmp_path: Path
) -> None:
    made = step(bits=4, group_size=32, scale_bits=scale_bits)
    small = model.with_module(by_matrix(model.module, made, Setting(model.facts.vocab_size)))
    small.save_pretrained(tmp_path / "small")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    names = ("scales", "offsets") if step is HQQ else ("scales",)
    assert {one.dtype for key, one in tensors.items() if key.endswith(names)} == {stored}
    state = small.module.state_dict()
    computed = sum(one.nbytes for key, one in small.module.named_buffers() if key not in state)
    assert sum(one.nbytes for one in tensors.values()) == stored_bytes(small.module) - computed
    again = lmopt.Model.from_pretrained(tmp_path / "small")
    for path, part in quantized_parts(small.module).items():
        other = quantized_parts(again.module)[path]
        assert other.scales.dtype == torch.float32
        assert torch.equal(other.weight, part.weight)
