"""Checkpoints of GPTQ and AWQ load without these libraries, with the very values that their kernels compute.

The packers here follow the loops of the formats' authors, word by word and code by code:
AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda.py, `QuantLinear.pack`;
GPTQModel, gptqmodel/utils/model.py, `convert_gptq_v2_to_v1_format_module`;
AutoAWQ, awq/modules/linear/gemm.py, `WQLinear_GEMM.from_linear`.
"""

import json
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
    llama_of_32s,
    logits,
    same_values,
    small_llama,
    write_folder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lmopt
from lmopt.backends.torch.gptq_awq_files import read_awq, read_gptq
from lmopt.backends.torch.quantized import QuantizedLinear, quantized_parts
from lmopt.errors import CorruptArtifactError, UnsafeArtifactError, UnsupportedError
from lmopt.types import FloatArray

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}


class Grid:
    """Random codes, zeros and half precision scales of a linear, and the values that they mean."""

    def __init__(
        self, rows: int, columns: int, bits: int, group_size: int, *, seed: int = 0, lowest: int = 1
    ) -> None:
        random = np.random.default_rng(seed)
        self.bits, self.group = bits, np.arange(columns) // (columns if group_size == -1 else group_size)
        groups = int(self.group[-1]) + 1
        self.codes = random.integers(0, 2**bits, (columns, rows)).astype(np.uint32)
        # The first version of GPTQ's format cannot tell a zero point of 0.
        self.zeros = random.integers(lowest, 2**bits, (groups, rows)).astype(np.uint32)
        self.scales = (random.random((groups, rows)) * 0.02 + 0.001).astype(np.float16)

    def values(self) -> FloatArray:
        exact = (self.codes.astype(np.float64) - self.zeros[self.group]) * self.scales[self.group].astype(
            np.float64
        )
        assert np.array_equal(exact.astype(np.float32), exact)
        return exact.astype(np.float32).T


def gptq_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack along the first axis, as AutoGPTQ does: 3-bit codes in runs of 32 that fill three words."""
    words = np.zeros((len(codes) // 32 * bits, codes.shape[1]), np.uint32)
    if bits != 3:
        each = 32 // bits
        for row in range(len(words)):
            for place in range(each):
                words[row] |= codes[row * each + place] << np.uint32(bits * place)
        return words
    for run in range(len(codes) // 32):
        code, word = codes[32 * run :], words[3 * run :]
        for place in range(10):
            word[0] |= code[place] << np.uint32(3 * place)
            word[1] |= code[11 + place] << np.uint32(3 * place + 1)
            word[2] |= code[22 + place] << np.uint32(3 * place + 2)
        word[0] |= code[10] << np.uint32(30)
        word[1] |= (code[10] >> np.uint32(2)) & np.uint32(1)
        word[1] |= code[21] << np.uint32(31)
        word[2] |= (code[21] >> np.uint32(1)) & np.uint32(3)
    return words


def pack_gptq(grid: Grid, version: str = "gptq") -> dict[str, Tensor]:
    stored = grid.zeros - np.uint32(version == "gptq")
    return {
        "qweight": words_tensor(gptq_words(grid.codes, grid.bits)),
        "qzeros": words_tensor(gptq_words(stored.T.copy(), grid.bits).T),
        "scales": torch.from_numpy(grid.scales.copy()),
        "g_idx": torch.from_numpy(grid.group.astype(np.int32)),
    }


def pack_awq(grid: Grid) -> dict[str, Tensor]:
    def words(codes: np.ndarray) -> Tensor:
        found = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
        for column in range(found.shape[1]):
            for place, source in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                found[:, column] |= codes[:, 8 * column + source] << np.uint32(4 * place)
        return words_tensor(found)

    return {
        "qweight": words(grid.codes),
        "qzeros": words(grid.zeros),
        "scales": torch.from_numpy(grid.scales.copy()),
    }


def words_tensor(words: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def grids(bits: int = 4, group_size: int = 16, lowest: int = 1) -> Callable[[str, nn.Linear], Grid]:
    """A grid for each linear, the same at each call."""

    def grid(path: str, part: nn.Linear) -> Grid:
        seed = sum(path.encode())
        return Grid(part.out_features, part.in_features, bits, group_size, seed=seed, lowest=lowest)

    return grid


def check(model: lmopt.Model, original: Any, grid: Callable[[str, nn.Linear], Grid]) -> None:
    """Compare each part with its grid, and the logits with those of a float model of the same weights."""
    linears = {
        path: part
        for path, part in original.named_modules()
        if isinstance(part, nn.Linear) and path != "lm_head"
    }
    parts = quantized_parts(model.module)
    assert parts.keys() == linears.keys()
    for path, part in linears.items():
        values = grid(path, part).values()
        assert isinstance(parts[path], QuantizedLinear)
        assert same_values(parts[path], values), path
        with torch.no_grad():
            part.weight.copy_(torch.from_numpy(values))
    assert torch.equal(logits(model.module), logits(original))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(bits: int, group_size: int, version: str, tmp_path: Path) -> None:
    grid = grids(bits, group_size, lowest=int(version == "gptq"))
    described = GPTQ | {"bits": bits, "group_size": group_size, "checkpoint_format": version}
    folder, original = write_folder(
        tmp_path / "m", described, lambda path, part: pack_gptq(grid(path, part), version)
    )
    model = lmopt.Model.from_pretrained(folder)
    check(model, original, grid)
    model.save_pretrained(tmp_path / "again")
    assert lmopt.Model.from_pretrained(tmp_path / "again").fingerprint() == model.fingerprint()


@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_awq(group_size: int, tmp_path: Path) -> None:
    grid = grids(4, group_size, lowest=0)
    folder, original = write_folder(
        tmp_path / "m", AWQ | {"group_size": group_size}, lambda path, part: pack_awq(grid(path, part))
    )
    check(lmopt.Model.from_pretrained(folder), original, grid)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    group_size=st.sampled_from([8, 16, 24, 32, 48, 64, -1]),
    second=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gptq_of_any_size(
    bits: int, rows: int, columns: int, group_size: int, second: bool, seed: int
) -> None:
    version = "gptq_v2" if second else "gptq"
    grid = Grid(32 * rows, 32 * columns, bits, group_size, seed=seed, lowest=int(not second))
    read = read_gptq(GPTQ | {"bits": bits, "group_size": group_size, "checkpoint_format": version}, "m")
    array = read(pack_gptq(grid, version), 32 * rows, 32 * columns, "q")
    assert np.array_equal(array.values(), grid.values())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 90),
    group_size=st.sampled_from([8, 16, 24, 32, -1]),
    seed=st.integers(0, 99),
)
def test_awq_of_any_size(rows: int, columns: int, group_size: int, seed: int) -> None:
    grid = Grid(8 * rows, columns, 4, group_size, seed=seed, lowest=0)
    array = read_awq(AWQ | {"group_size": group_size}, "m")(pack_awq(grid), 8 * rows, columns, "q")
    assert np.array_equal(array.values(), grid.values())


def read_one(grid: Grid, stored: dict[str, Tensor], **described: Any) -> FloatArray:
    columns, rows = grid.codes.shape
    return read_gptq(GPTQ | {"bits": grid.bits} | described, "m")(stored, rows, columns, "q").values()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_symmetric_file_may_name_the_wrong_version(bits: int) -> None:
    grid = Grid(32, 32, bits, 16)
    grid.zeros[:] = 2 ** (bits - 1)
    for stored, named in (("gptq_v2", "gptq"), ("gptq", "gptq_v2"), ("gptq", "gptq"), ("gptq_v2", "gptq_v2")):
        values = read_one(grid, pack_gptq(grid, stored), checkpoint_format=named, sym=True)
        assert np.array_equal(values, grid.values())
    # Without that promise the file is taken at its word.
    assert not np.array_equal(read_one(grid, pack_gptq(grid, "gptq_v2")), grid.values())


def test_symmetric_weights_keep_no_zero_points() -> None:
    grid = Grid(32, 32, 4, 16)
    grid.zeros[:] = 8
    array = read_gptq(GPTQ, "m")(pack_gptq(grid), 32, 32, "q")
    assert array.grid.zero == "symmetric"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_that_gptqmodel_carried_over_come_back(bits: int) -> None:
    grid = Grid(32, 32, bits, 16, lowest=0)
    grid.zeros[0, 5] = 0
    stored = pack_gptq(grid, "gptq_v2")
    one_each = np.int32(sum(1 << place for place in range(0, 32, bits)))
    stored["qzeros"] = stored["qzeros"] - int(one_each)
    values = read_one(grid, stored, meta={"quantizer": ["gptqmodel:2.0.0"]})
    assert np.array_equal(values, grid.values())
    with pytest.raises(UnsupportedError, match="gptq_v2"):
        read_one(grid, stored, meta={"quantizer": "auto_gptq:0.7"})


def test_parts_may_be_of_other_forms(tmp_path: Path) -> None:
    wide, narrow = grids(8, 32), grids(4, 16)

    def grid(path: str, part: nn.Linear) -> Grid:
        return (wide if path.endswith("down_proj") else narrow)(path, part)

    described = GPTQ | {"dynamic": {"+:.*down_proj": {"bits": 8, "group_size": 32}}}
    folder, original = write_folder(tmp_path / "m", described, lambda path, part: pack_gptq(grid(path, part)))
    check(lmopt.Model.from_pretrained(folder), original, grid)


def test_what_old_files_hold_needlessly_is_left_out(tmp_path: Path) -> None:
    grid = grids()
    folder, original = write_folder(
        tmp_path / "m",
        GPTQ,
        lambda path, part: (
            pack_gptq(grid(path, part)) | {"bias": torch.zeros(part.out_features, dtype=torch.float16)}
        ),
    )
    change_tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(
        folder
    )
    check(lmopt.Model.from_pretrained(folder), original, grid)
    change_tensors(lambda t: t[f"{Q}.bias"].add_(1))(folder)
    with pytest.raises(CorruptArtifactError, match=f"not part of the model: {Q}.bias"):
        lmopt.Model.from_pretrained(folder)


def test_gpt2_stores_its_linears_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2
    )
    module = GPT2LMHeadModel(config).eval()
    folder, _ = write_folder(tmp_path / "m", GPTQ, lambda _path, _part: {}, module)
    expected = {}

    def pack(tensors: dict[str, Tensor]) -> None:
        tensors.pop("lm_head.weight", None)
        for path, part in module.named_modules():
            if type(part).__name__ == "Conv1D":
                grid = Grid(part.nf, part.nx, 4, 16)
                expected[path] = grid.values()
                del tensors[f"{path}.weight"]
                tensors |= {f"{path}.{name}": one for name, one in pack_gptq(grid).items()}

    change_tensors(pack)(folder)
    parts = quantized_parts(lmopt.Model.from_pretrained(folder).module)
    assert parts.keys() == expected.keys()
    assert all(same_values(parts[path], values) for path, values in expected.items())


def test_weights_that_are_said_to_be_one_must_be_one(tmp_path: Path) -> None:
    grid = grids()
    module = llama_of_32s()
    module.config.tie_word_embeddings = True
    folder, _ = write_folder(tmp_path / "m", GPTQ, lambda path, part: pack_gptq(grid(path, part)), module)
    with pytest.raises(CorruptArtifactError, match=r"different: model\.embed_tokens\.weight and lm_"):
        lmopt.Model.from_pretrained(folder)
    change_tensors(lambda t: t.pop("lm_head.weight"))(folder)
    model = lmopt.Model.from_pretrained(folder)
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


def test_half_precision_stays_exact_until_it_is_used(tmp_path: Path) -> None:
    grid = grids()
    folder, original = write_folder(
        tmp_path / "m", GPTQ, lambda path, part: pack_gptq(grid(path, part)), llama_of_32s().half()
    )
    model = lmopt.Model.from_pretrained(folder)
    assert model.module.dtype == torch.float16
    for path, part in quantized_parts(model.module).items():
        assert same_values(part, grid(path, original.get_submodule(path)).values())
    assert logits(model.module).isfinite().all()


_UNSUPPORTED = {
    "act-order": (GPTQ, change_tensors(lambda t: t[f"{Q}.g_idx"].copy_(t[f"{Q}.g_idx"].flip(0))), "desc_act"),
    "marlin": (GPTQ, change_config(lambda c: c.update(checkpoint_format="marlin")), "'marlin'"),
    "is marlin": (GPTQ, change_config(lambda c: c.update(is_marlin_format=True)), "checkpoint format"),
    "planar": (GPTQ, change_config(lambda c: c.update(checkpoint_format="gptq_p")), "'gptq_p'"),
    "short words": (GPTQ, change_config(lambda c: c.update(pack_dtype="int8")), "'int8'"),
    "five bits": (GPTQ, change_config(lambda c: c.update(bits=5)), "5 bits"),
    "adapter": (GPTQ, change_config(lambda c: c.update(adapter={"name": "lora"})), "adapter"),
    "gemv": (AWQ, change_config(lambda c: c.update(version="gemv")), "'gemv'"),
    "llm-awq": (AWQ, change_config(lambda c: c.update(backend="llm-awq")), "version"),
    "awq of 8 bits": (AWQ, change_config(lambda c: c.update(bits=8)), "8 bits"),
    "fused experts": (
        GPTQ,
        change_tensors(lambda t: t.update({"model.layers.0.mlp.experts.0.up_proj.qweight": t[f"{Q}.qweight"]})),
        "fuses experts",
    ),
    "no matrix": (
        GPTQ,
        change_tensors(lambda t: t.update({"model.norm.qweight": t[f"{Q}.qweight"]})),
        "no linear",
    ),
    "another method": (GPTQ, change_config(lambda c: c.update(quant_method="exl3")), "exl3.*gptq, awq"),
}  # fmt: skip

_CORRUPT = {
    "no zeros": (GPTQ, change_tensors(lambda t: t.pop(f"{Q}.qzeros")), "no qzeros"),
    "no scales": (GPTQ, change_tensors(lambda t: t.pop(f"{Q}.scales")), "no scales"),
    "no codes": (GPTQ, change_tensors(lambda t: t.pop(f"{Q}.qweight")), "missing: .*q_proj.weight"),
    "no order": (
        GPTQ | {"desc_act": True}, change_tensors(lambda t: t.pop(f"{Q}.g_idx")), "g_idx .* missing"
    ),
    "short codes": (
        GPTQ, change_tensors(lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][1:]})), r"int32 of shape"
    ),
    "codes of another width": (GPTQ, change_config(lambda c: c.update(bits=8)), r"int32 of shape"),
    "codes are floats": (
        GPTQ, change_tensors(lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()})), "float32"
    ),
    "a vector": (
        GPTQ, change_tensors(lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][0]})), "no matrix"
    ),
    "no groups": (
        GPTQ, change_tensors(lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:0]})), "0 groups"
    ),
    "groups of another size": (GPTQ, change_config(lambda c: c.update(group_size=64)), "4 groups for 64"),
    "scales are whole": (
        GPTQ, change_tensors(lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].int()})), "expected float16"
    ),
    "a scale is NaN": (GPTQ, change_tensors(lambda t: t[f"{Q}.scales"].fill_(torch.nan)), "NaN"),
    "groups of nothing": (GPTQ, change_config(lambda c: c.update(group_size=0)), "group_size 0"),
    "groups below -1": (GPTQ, change_config(lambda c: c.update(group_size=-2)), "group_size -2"),
    "groups are text": (GPTQ, change_config(lambda c: c.update(group_size="16")), "group_size '16'"),
    "groups are true": (GPTQ, change_config(lambda c: c.update(group_size=True)), "group_size True"),
    "no bits": (GPTQ, change_config(lambda c: c.pop("bits")), "bits None"),
    "many bits": (GPTQ, change_config(lambda c: c.update(bits=4.0)), "bits 4.0"),
    "awq without zeros": (AWQ, change_tensors(lambda t: t.pop(f"{Q}.qzeros")), "no qzeros"),
    "awq of another order": (
        AWQ, change_tensors(lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].T})), "int32 of shape"
    ),
    "nothing is quantized": (
        GPTQ,
        change_tensors(lambda t: [t.pop(name) for name in list(t) if name.endswith(".qweight")]),
        "no tensor is",
    ),
    "something is left over": (GPTQ, change_tensors(lambda t: t.update(more=torch.ones(1))), "not part of"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "error"),
    [(one, UnsupportedError) for one in _UNSUPPORTED] + [(one, CorruptArtifactError) for one in _CORRUPT],
)
def test_refusals(case: str, error: type[Exception], tmp_path: Path) -> None:
    described, damage, told = (_UNSUPPORTED | _CORRUPT)[case]
    pack: Callable[[Grid], dict[str, Tensor]] = pack_gptq if described["quant_method"] == "gptq" else pack_awq
    grid = grids()
    folder, _ = write_folder(tmp_path / "m", described, lambda path, part: pack(grid(path, part)))
    damage(folder)
    with pytest.raises(error, match=told):
        lmopt.Model.from_pretrained(folder)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    grid = grids()
    folder, _ = write_folder(tmp_path / "m", GPTQ, lambda path, part: pack_gptq(grid(path, part)))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsafeArtifactError, match="pickle"):
        lmopt.Model.from_pretrained(folder)


def test_awq_without_zero_points_is_symmetric(tmp_path: Path) -> None:
    def grid(path: str, part: nn.Linear) -> Grid:
        found = grids()(path, part)
        found.zeros[:] = 8
        return found

    def pack(path: str, part: nn.Linear) -> dict[str, Tensor]:
        stored = pack_awq(grid(path, part))
        del stored["qzeros"]
        return stored

    folder, original = write_folder(tmp_path / "m", AWQ | {"zero_point": False}, pack)
    check(lmopt.Model.from_pretrained(folder), original, grid)


def test_shards_are_read_together(tmp_path: Path) -> None:
    grid = grids()
    folder, original = write_folder(tmp_path / "m", GPTQ, lambda path, part: pack_gptq(grid(path, part)))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {}
    for number in (0, 1):
        name = f"model-{number}.safetensors"
        shard = {key: tensors[key] for key in sorted(tensors)[number::2]}
        save_file(shard, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check(lmopt.Model.from_pretrained(folder), original, grid)


def test_a_float_head_stays_tied_in_every_class(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2
    )
    module = small_llama(module=GPT2LMHeadModel(config).eval())
    lmopt.Model.from_module(module).save_pretrained(tmp_path / "m")
    back = lmopt.Model.from_pretrained(tmp_path / "m").module
    assert back.lm_head.weight is back.transformer.wte.weight
    assert torch.equal(logits(back), logits(module))
