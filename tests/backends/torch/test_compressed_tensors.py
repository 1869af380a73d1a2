"""Quantized models go out in the format of compressed-tensors and come in from it, bit by bit.

What the library itself makes of it, alone and in transformers, is the judge wherever it is installed.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_folders import (
    Q,
    change_config,
    change_tensors,
    llama_of,
    llama_of_32s,
    logits,
    same_values,
    small_llama,
    tied_llama,
    write_folder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import lmopt
from lmopt.backends.torch.bitstreams import pack_stream, unpack_stream, words
from lmopt.backends.torch.compressed_tensors import read_part, read_schemes
from lmopt.backends.torch.compressed_tensors_writing import _pack, _written_group, write
from lmopt.backends.torch.gptq_awq_files import read_awq
from lmopt.backends.torch.quantized import QuantizedLinear, quantized_parts
from lmopt.backends.torch.quantizing import find_weights, replace_weights
from lmopt.compression.layout import BITS, Grid, QuantizedArray, pack, quantize, unpack
from lmopt.errors import CorruptArtifactError, UnsupportedError, UnsupportedOptionError
from lmopt.testing.models import VOCAB_SIZE, tiny_gpt, tiny_llama

FORMAT = "compressed-tensors"


@pytest.fixture(scope="module")
def library() -> Any:
    """The library, as a second opinion."""
    return pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors is not installed: pip install compressed-tensors"
    )


def save(module: Any, folder: Path, **options: Any) -> lmopt.Model:
    model = lmopt.Model.from_module(module)
    model.save_pretrained(folder, quantization_format=FORMAT, **options)
    return model


def check_same(ours: Any, theirs: lmopt.Model) -> None:
    """Compare all quantized weights bit by bit, and the logits."""
    before, after = quantized_parts(ours), quantized_parts(theirs.module)
    assert after.keys() == before.keys()
    for path, part in before.items():
        assert same_values(after[path], part.weight.numpy()), path
    assert torch.equal(logits(theirs.module), logits(ours))


# Our own writer and reader ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_every_grid_comes_back(bits: int, symmetric: bool, group_size: int, tmp_path: Path) -> None:
    module = small_llama(bits, group_size, symmetric)
    model = save(module, tmp_path / "m")
    back = lmopt.Model.from_pretrained(tmp_path / "m")
    check_same(module, back)
    assert back.facts == model.facts
    assert {part.grid.bits for part in quantized_parts(back.module).values()} == {4 if bits <= 4 else 8}


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    module = small_llama(4, 16, False)
    save(module, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == "float32"
    described = config["quantization_config"]
    assert described["quant_method"] == FORMAT
    assert described["ignore"] == ["lm_head"]
    assert list(described["config_groups"]) == ["group_0"]
    weights = described["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 16, False)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    stored = {name: tuple(one.shape) for name, one in tensors.items() if name.startswith(Q)}
    assert stored == {
        f"{Q}.weight_packed": (32, 4), f"{Q}.weight_scale": (32, 2), f"{Q}.weight_shape": (2,),
        f"{Q}.weight_zero_point": (4, 2),
    }  # fmt: skip
    manifest = json.loads((tmp_path / "m" / "lmopt.json").read_text())["formats"]["safetensors"]
    assert (manifest["quantization_format"], manifest["dequantized"]) == (FORMAT, [])


@st.composite
def weights(draw: st.DrawFn) -> QuantizedArray:
    bits = draw(st.sampled_from(list(BITS)))
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 100))
    size = draw(st.sampled_from([16, 32, 48, 128]))
    integer = draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 9)))
    grid = Grid(rows, columns, bits, size, "integer" if integer else "symmetric")
    codes = random.integers(0, 2**bits, (rows, grid.groups, size), dtype=np.uint8)
    zeros = random.integers(0, 2**bits, (rows, grid.groups), dtype=np.uint8)
    scales = (random.standard_normal((rows, grid.groups)) * 10).astype(np.float32)
    return QuantizedArray(grid, pack(codes, grid), scales, zeros if integer else None)


@settings(max_examples=150, deadline=None)
@given(weights(), st.booleans())
def test_any_weight_comes_back(array: QuantizedArray, with_zeros: bool) -> None:
    grid = array.grid
    size = _written_group(grid)
    if not size:
        assert grid.columns % grid.group_size
        assert np.gcd(grid.columns, grid.group_size) < 16
        return
    (bits, size, symmetric), stored = _pack(QuantizedLinear(array), torch.float32, "q", size, with_zeros)
    assert symmetric is not (with_zeros or array.zero_points is not None)
    described = {"num_bits": bits, "symmetric": symmetric, "group_size": size}
    back = read_part([described], stored, grid.rows, grid.columns, "q")
    assert np.array_equal(back.values(), array.values())


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(BITS)), st.integers(1, 5), st.integers(1, 70), st.integers(0, 99))
def test_streams_come_back(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count), dtype=np.uint8)
    stream = pack_stream(codes, bits)
    assert stream.shape == (rows, 4 * words(count, bits))
    assert np.array_equal(unpack_stream(stream, count, bits), codes)


def test_groups_that_do_not_divide_become_smaller_ones(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=80, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    module = small_llama(4, 32, module=LlamaForCausalLM(config).eval())
    save(module, tmp_path / "m")
    back = lmopt.Model.from_pretrained(tmp_path / "m")
    check_same(module, back)
    assert {part.grid.group_size for part in quantized_parts(back.module).values()} == {16}
    with_zeros = small_llama(4, 32, False, module=LlamaForCausalLM(config).eval())
    save(with_zeros, tmp_path / "zeros")
    check_same(with_zeros, lmopt.Model.from_pretrained(tmp_path / "zeros"))
    odd = small_llama(4, 24, module=LlamaForCausalLM(config).eval())
    with pytest.raises(UnsupportedOptionError, match="80 columns are no whole number of groups of 24"):
        save(odd, tmp_path / "odd")


def test_half_precision_needs_scales_of_its_type(tmp_path: Path) -> None:
    # Powers of two: symmetric scales of rounding to nearest keep the type of the weights.
    save(small_llama(module=llama_of(torch.bfloat16)), tmp_path / "nearest")
    module = small_llama(symmetric=False, module=llama_of(torch.bfloat16))
    with pytest.raises(UnsupportedOptionError, match=r"bfloat16.*model\.module\.float\(\)"):
        save(module, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    for part in quantized_parts(module).values():
        part.scales.copy_(part.scales.bfloat16())
    save(module, tmp_path / "m")
    check_same(module, lmopt.Model.from_pretrained(tmp_path / "m"))
    assert load_file(tmp_path / "m" / "model.safetensors")[f"{Q}.weight_scale"].dtype == torch.bfloat16
    module = small_llama(symmetric=False, module=llama_of(torch.bfloat16))
    save(module.float(), tmp_path / "float")
    back = lmopt.Model.from_pretrained(tmp_path / "float")
    check_same(module, back)
    assert back.module.dtype == torch.float32


def offset_llama() -> Any:
    def round_off(weight: Any, matrix: Any) -> QuantizedArray | None:
        if weight.part != "linear":
            return None
        found = quantize(matrix, 4, 16)
        grid = Grid(*matrix.shape, 4, 16, "offset")
        return QuantizedArray(grid, found.codes, found.scales, offsets=found.scales * np.float32(-8.5))

    module = tiny_llama()
    return replace_weights(module, find_weights(module, VOCAB_SIZE), round_off)


def narrow_llama() -> Any:
    """A layer is narrower than config.json says, as pruning leaves it."""
    module = tiny_llama()
    mlp = module.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
    mlp.down_proj = nn.Linear(48, 32, bias=False)
    return small_llama(module=module)


def pruned_llama() -> Any:
    module = small_llama()
    module.config.lmopt_widths = {Q: [24, 32]}
    return module


def tied(bits: int = 8) -> Any:
    return small_llama(bits, parts=("linear", "embedding", "head"), module=tied_llama())


_UNSAYABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "offsets": (offset_llama, "float offsets"),
    "an embedding": (lambda: small_llama(parts=("linear", "embedding")), "embed_tokens: .*no quantized embedding"),
    "pruned widths": (pruned_llama, "layers differ in width"),
    "another size": (narrow_llama, r"up_proj: transformers builds \(64, 32\) by config.json, not \(48, 32\)"),
    "a tied head": (tied, "lm_head: it is tied"),
    "zero points of several forms": (
        lambda: small_llama(symmetric=False, of=lambda one: (8 if "down" in one.path else 4, 16)),
        r"4 bits in groups of 16 .*8 bits in groups of 16",
    ),
    "nothing quantized": (tiny_llama, "no quantized weights"),
    "an own class": (
        lambda: replace_weights(
            tiny_gpt(), find_weights(tiny_gpt(), VOCAB_SIZE)[:0], lambda _weight, _matrix: None
        ),
        "class of your own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _UNSAYABLE)
def test_what_the_format_cannot_say_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    build, told = _UNSAYABLE[case]
    with pytest.raises(UnsupportedOptionError, match=told):
        save(build(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [
    {"quantization_format": "gptq"}, {"quantization_format": None}, {"dequantize": True},
])  # fmt: skip
def test_unknown_formats_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="expected one of lmopt, compressed-tensors"):
        lmopt.Model.from_module(small_llama()).save_pretrained(tmp_path / "m", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_exporter_writes_it_too(tmp_path: Path) -> None:
    model = save(small_llama(), tmp_path / "saved")
    artifact = lmopt.Exporter("safetensors", quantization_format=FORMAT).export(model, tmp_path / "out")
    assert artifact.manifest["formats"]["safetensors"]["quantization_format"] == FORMAT
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "saved/model.safetensors"
    ).read_bytes()
    with pytest.raises(UnsupportedOptionError, match="it has: quantization_format, dequantize"):
        lmopt.Exporter("safetensors", quality="best").export(model, tmp_path / "other")


def test_what_the_format_cannot_say_is_written_in_float_on_request(tmp_path: Path) -> None:
    module = tied()
    save(module, tmp_path / "m", dequantize=True)
    manifest = json.loads((tmp_path / "m" / "lmopt.json").read_text())["formats"]["safetensors"]
    assert manifest["dequantized"] == ["model.embed_tokens", "lm_head"]
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    back = lmopt.Model.from_pretrained(tmp_path / "m").module
    assert torch.equal(back.model.embed_tokens.weight, module.model.embed_tokens.weight)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert torch.equal(logits(back), logits(module))
    with pytest.raises(UnsupportedOptionError, match="cannot hold 14 of 14"):
        save(offset_llama(), tmp_path / "nothing-left", dequantize=True)


def test_gpt2_has_no_linears_to_say_it_of(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    module = small_llama(parts=("linear", "head"), module=GPT2LMHeadModel(config).eval())
    with pytest.raises(UnsupportedOptionError, match="to transformers it is a Conv1D"):
        save(module, tmp_path / "m")
    save(module, tmp_path / "m", dequantize=True)
    back = lmopt.Model.from_pretrained(tmp_path / "m").module
    assert quantized_parts(back).keys() == {"lm_head"}
    assert torch.allclose(logits(back), logits(module), atol=1e-5)


# The library as judge -----------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [
    (4, 16, True), (4, 16, False), (4, 32, False), (8, 16, True), (8, 32, False), (3, 16, True),
    (2, 16, False), (6, 16, True), (8, 64, True),
])  # fmt: skip
def test_transformers_reads_what_lmopt_writes(
    bits: int, group_size: int, symmetric: bool, library: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    module = small_llama(bits, group_size, symmetric)
    save(module, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(logits(theirs), logits(module), rtol=0, atol=2e-6)
    for path, part in quantized_parts(module).items():
        assert torch.equal(theirs.get_submodule(path).weight, part.weight), path


def test_transformers_reads_several_forms_and_a_head(library: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = small_llama(
        parts=("linear", "head"), of=lambda one: (8, 16) if "down" in one.path or one.part == "head" else (4, 32)
    )  # fmt: skip
    save(module, tmp_path / "m")
    check_same(module, lmopt.Model.from_pretrained(tmp_path / "m"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(logits(theirs), logits(module), rtol=0, atol=2e-6)
    for path, part in quantized_parts(module).items():
        assert torch.equal(theirs.get_submodule(path).weight, part.weight), path


def test_transformers_reads_tied_embeddings_in_float(library: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = tied()
    save(module, tmp_path / "m", dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(logits(theirs), logits(module), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_the_library(bits: int, library: Any) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for count in (1, 7, 32, 45, 64):
        codes = np.random.default_rng(count).integers(0, 2**bits, (3, count), dtype=np.uint8)
        signed = torch.from_numpy(codes.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
        expected = pack_to_int32(signed, bits).numpy()
        assert np.array_equal(pack_stream(codes, bits).view("<i4"), expected)


def compress(module: Any, folder: Path, weights: dict[str, Any], **scheme: Any) -> None:
    """Quantize and save as llm-compressor does: schemes, scales, then the library's compressor."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    args = QuantizationArgs(**weights)
    group = QuantizationScheme(targets=["Linear"], weights=args, **scheme)
    apply_quantization_config(
        module,
        QuantizationConfig(
            config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="frozen"
        ),
    )
    for part in module.modules():
        if getattr(part, "quantization_scheme", None) is None:
            continue
        matrix = part.weight.detach().float()
        size = args.group_size if args.strategy == "group" else matrix.shape[1]
        groups = matrix.reshape(len(matrix), -1, size)
        if args.strategy == "tensor":
            groups = groups.reshape(1, 1, -1)
        low, high, top = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), 2**args.num_bits - 1
        scale = (high - low) / top if not args.symmetric else torch.maximum(-low, high) * 2 / top
        zero = torch.round(-low / scale) - 2 ** (args.num_bits - 1)
        part.weight_scale.data.copy_(scale.reshape(part.weight_scale.shape))
        if not args.symmetric:
            part.weight_zero_point.data.copy_(zero.reshape(part.weight_scale.shape))
    compressor = ModelCompressor.from_pretrained_model(module)
    compressor.compress_model(module)
    module.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(module)


_SCHEMES: dict[str, dict[str, Any]] = {
    "W4A16": {"num_bits": 4, "strategy": "group", "group_size": 16},
    "W4A16 asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    "W8A16": {"num_bits": 8, "strategy": "group", "group_size": 32},
    "W8A16 asymmetric": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "W4A16 channel": {"num_bits": 4, "strategy": "channel"},
    "W3A16": {"num_bits": 3, "strategy": "group", "group_size": 16},
    "W5A16 asymmetric": {"num_bits": 5, "strategy": "group", "group_size": 32, "symmetric": False},
    "W4A16 static order": {"num_bits": 4, "strategy": "group", "group_size": 16, "actorder": "static"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", _SCHEMES)
def test_lmopt_reads_what_the_library_writes(
    scheme: str, dtype: torch.dtype, library: Any, tmp_path: Path
) -> None:
    theirs = llama_of(dtype)
    compress(theirs, tmp_path / "m", _SCHEMES[scheme])
    model = lmopt.Model.from_pretrained(tmp_path / "m")
    parts = quantized_parts(model.module)
    assert len(parts) == 14
    for path, part in parts.items():
        # What the library rounds to the type of its scales, lmopt keeps exact until it is used.
        assert torch.equal(part.weight.to(dtype), theirs.get_submodule(path).weight), path
        assert part.grid.bits == _SCHEMES[scheme]["num_bits"]
    assert model.module.dtype == dtype
    assert torch.equal(logits(model.module), logits(theirs))


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int8_weights_with_dynamic_activations_keep_their_weights(
    strategy: str, library: Any, tmp_path: Path
) -> None:
    from compressed_tensors.quantization import QuantizationArgs

    theirs = tiny_llama()
    inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    compress(theirs, tmp_path / "m", {"num_bits": 8, "strategy": strategy}, input_activations=inputs)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "int-quantized"
    model = lmopt.Model.from_pretrained(tmp_path / "m")
    for path, part in quantized_parts(model.module).items():
        assert torch.equal(part.weight, theirs.get_submodule(path).weight), path


def test_int8_weights_with_zero_points() -> None:
    random = np.random.default_rng(0)
    codes, zeros = random.integers(-128, 128, (6, 32)), random.integers(-128, 128, (6, 2))
    scales = random.random((6, 2), np.float32)
    stored = {
        "weight": torch.tensor(codes, dtype=torch.int8),
        "weight_scale": torch.from_numpy(scales),
        "weight_zero_point": torch.tensor(zeros, dtype=torch.int8),
    }
    array = read_part([{"num_bits": 8, "symmetric": False, "group_size": 16}], stored, 6, 32, "q")
    expected = (codes - zeros.repeat(16, 1)).astype(np.float32) * scales.repeat(16, 1)
    assert np.array_equal(array.values(), expected)


@pytest.mark.parametrize("scale", [(6, 1), (1,)])
def test_zero_points_need_not_be_packed(scale: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    codes, zeros = random.integers(0, 16, (6, 40), dtype=np.uint8), random.integers(-8, 8, scale)
    scales = random.random(scale, np.float32)
    stored = {
        "weight_packed": torch.from_numpy(pack_stream(codes, 4).view("<i4").copy()),
        "weight_scale": torch.from_numpy(scales),
        "weight_zero_point": torch.tensor(zeros, dtype=torch.int8),
    }
    array = read_part([{"num_bits": 4, "symmetric": False}], stored, 6, 40, "q")
    signed = codes.astype(np.int64) - 8
    assert np.array_equal(array.values(), (signed - zeros).astype(np.float32) * scales)
    # What fills the row up means zero, which kernels may multiply.
    filled = unpack(array.codes, array.grid).reshape(6, -1)[:, 40:]
    assert filled.shape == (6, 8)
    assert np.array_equal(filled, np.broadcast_to(array.zero_points, (6, 8)))


def test_awq_files_mean_what_the_library_takes_them_for(library: Any) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    random = np.random.default_rng(0)
    words_of = lambda *shape: torch.from_numpy(random.integers(-(2**31), 2**31, shape).astype(np.int32))  # noqa: E731
    stored = {"qweight": words_of(64, 5), "qzeros": words_of(4, 5), "scales": torch.rand(4, 40).half()}
    described = {"bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    ours = read_awq(described, "m")(stored, 40, 64, "q").values()
    converted = AutoAWQConverter(group_size=16).process({f"q.{name}": one for name, one in stored.items()})
    local = {name.removeprefix("q."): one for name, one in converted.items()}
    local["weight_scale"] = local["weight_scale"].float()
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=16, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(local, scheme)["weight"]
    assert np.array_equal(theirs.numpy(), ours)


# Refusals -----------------------------------------------------------------------------------------


def group(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    return change_config(lambda c: change(c["config_groups"]["group_0"]))


def weight(**fields: Any) -> Callable[[Path], None]:
    return group(lambda g: g["weights"].update(fields))


_UNSUPPORTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "static activations": (group(lambda g: g.update(input_activations={"dynamic": False})), "static"),
    "local activations": (group(lambda g: g.update(input_activations={"dynamic": "local"})), "static"),
    "quantized outputs": (group(lambda g: g.update(output_activations={"dynamic": True})), "outputs"),
    "fp8": (weight(type="float", num_bits=8), "fp8"),
    "nvfp4": (change_config(lambda c: c.update(format="nvfp4-pack-quantized")), "nvfp4-pack-quantized"),
    "nvfp4 in a group": (group(lambda g: g.update(format="nvfp4-pack-quantized")), "nvfp4-pack-quantized"),
    "marlin": (change_config(lambda c: c.update(format="marlin-24")), "marlin-24"),
    "dense": (change_config(lambda c: c.update(format="dense")), "'dense'"),
    "not compressed": (change_config(lambda c: c.update(quantization_status="frozen")), "frozen"),
    "key-value cache": (change_config(lambda c: c.update(kv_cache_scheme={"num_bits": 8})), "kv_cache"),
    "rotations": (change_config(lambda c: c.update(transform_config={"R1": {}})), "transform_config"),
    "sparse": (change_config(lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"})), "sparse-24"),
    "blocks": (weight(strategy="block"), "'block'"),
    "act-order": (weight(actorder="group"), "actorder 'group'"),
    "activations only": (
        group(lambda g: g.update(weights=None, input_activations={"dynamic": True})), "unquantized weights"
    ),
    "one bit": (weight(num_bits=1), "1-bit"),
    "order of columns": (
        change_tensors(lambda t: t.update({f"{Q}.weight_g_idx": torch.arange(32).flip(0) // 16})),
        "weight_g_idx",
    ),
}  # fmt: skip

_CORRUPT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no groups": (change_config(lambda c: c.update(config_groups={})), "no config_groups"),
    "groups are a list": (change_config(lambda c: c.update(config_groups=[1])), "no config_groups"),
    "a group is a name": (
        change_config(lambda c: c.update(config_groups={"W4A16": ["Linear"]})), "must say how"
    ),
    "no weights": (group(lambda g: g.update(weights=None)), "must say how"),
    "stored twice": (change_tensors(lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)})), "stored twice"),
    "another width": (weight(num_bits=8), "is no weight of 64 columns"),
    "another group size": (weight(group_size=8), "4 groups for 64 columns"),
    "groups of nothing": (weight(group_size=0), "4 groups for 64 columns"),
    "no scale": (change_tensors(lambda t: t.pop(f"{Q}.weight_scale")), "no weight_scale"),
    "no zeros": (change_tensors(lambda t: t.pop(f"{Q}.weight_zero_point")), "no weight_zero_point"),
    "no codes": (change_tensors(lambda t: t.pop(f"{Q}.weight_packed")), "missing: .*q_proj.weight"),
    "another shape": (change_tensors(lambda t: t[f"{Q}.weight_shape"].add_(1)), r"weight_shape .* \[33, 33\]"),
    "fewer rows": (
        change_tensors(lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][1:]})), "int32 of shape"
    ),
    "codes are floats": (
        change_tensors(lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"].float()})), "float32"
    ),
    "codes are a vector": (
        change_tensors(lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][0]})), "no weight of"
    ),
    "scales of fewer rows": (
        change_tensors(lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][1:]})), "float32 of shape"
    ),
    "no scales at all": (
        change_tensors(lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:, :0]})), "0 groups"
    ),
    "a scale is infinite": (change_tensors(lambda t: t[f"{Q}.weight_scale"].fill_(torch.inf)), "infinity"),
    "zeros of another shape": (
        change_tensors(lambda t: t.update({f"{Q}.weight_zero_point": t[f"{Q}.weight_zero_point"].T})),
        "weight_zero_point",
    ),
    "zeros are floats": (
        change_tensors(lambda t: t.update({f"{Q}.weight_zero_point": t[f"{Q}.weight_zero_point"].float()})),
        "weight_zero_point",
    ),
    "left over": (change_tensors(lambda t: t.update({f"{Q}.input_scale": torch.ones(1)})), "not part of"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "m"
    save(small_llama(symmetric=False), folder)
    (folder / "lmopt.json").unlink()  # its hashes would find out first
    return folder


@pytest.mark.parametrize(
    ("case", "error"),
    [(one, UnsupportedError) for one in _UNSUPPORTED] + [(one, CorruptArtifactError) for one in _CORRUPT],
)
def test_refusals(case: str, error: type[Exception], whole: Path, tmp_path: Path) -> None:
    damage, told = (_UNSUPPORTED | _CORRUPT)[case]
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(error, match=told):
        lmopt.Model.from_pretrained(tmp_path)


def test_a_word_may_not_fit_two_widths() -> None:
    schemes = read_schemes({
        "format": "pack-quantized",
        "config_groups": {str(bits): {"weights": {"num_bits": bits, "strategy": "channel"}} for bits in (3, 4)},
    }, "m")  # fmt: skip
    stored = {"weight_packed": torch.zeros(4, 1, dtype=torch.int32), "weight_scale": torch.ones(4, 1)}
    with pytest.raises(CorruptArtifactError, match="3, 4 bits"):
        read_part(schemes, stored, 4, 8, "q")


def test_writing_leaves_the_model_as_it_is() -> None:
    module = small_llama(3, 16, False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    written = write(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(tensor.is_contiguous() for tensor in written.tensors.values())


def test_biases_are_kept(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=1, attention_bias=True,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    small = small_llama(module=module)
    save(small, tmp_path / "m")
    check_same(small, lmopt.Model.from_pretrained(tmp_path / "m"))


def test_a_folder_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as plain arithmetic; importing the library fails."""
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)

    def stored(_path: str, part: nn.Linear) -> dict[str, Tensor]:
        rows, columns = part.weight.shape
        codes = torch.arange(rows * columns).reshape(rows, columns) % 16
        packed = sum(codes[:, place::8] << (4 * place) for place in range(8))
        packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        return {"weight_packed": packed, "weight_scale": torch.full((rows, 1), 0.25, dtype=torch.bfloat16)}

    described = {
        "quant_method": FORMAT, "format": "pack-quantized", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}},
    }  # fmt: skip
    folder, original = write_folder(tmp_path / "m", described, stored, llama_of_32s())
    for path, part in quantized_parts(lmopt.Model.from_pretrained(folder).module).items():
        rows, columns = original.get_submodule(path).weight.shape
        codes = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) % 16
        assert same_values(part, (codes - 8) * np.float32(0.25))
