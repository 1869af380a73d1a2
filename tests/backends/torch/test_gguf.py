"""GGUF files become plain float models that equal their originals and can be saved."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as reader

from lmopt.backends.torch.gguf import load_gguf
from lmopt.errors import ArtifactNotFoundError, CorruptArtifactError, UnsupportedError
from lmopt.model import Model

TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġa"]
TOKENS += [f"t{n}" for n in range(64 - len(TOKENS))]
MERGES = ["a b", "Ġ a"]
IDS = torch.tensor([[1, 5, 9, 30, 2]])


def original() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order rotary pairs as llama.cpp does."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(weight.shape))


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(
    path: Path,
    module: transformers.LlamaForCausalLM,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    architecture: str = "llama",
    drop: str = "",
    edit: Callable[[gguf.GGUFWriter], Any] | None = None,
) -> Path:
    config = module.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    if edit:
        edit(writer)

    def add(name: str, tensor: Tensor, heads: int = 0) -> None:
        if name == drop:
            return
        value = tensor.detach().numpy()
        value = permuted(value, heads) if heads else value
        stored = gguf.quants.quantize(value, kind) if value.ndim > 1 else value
        writer.add_tensor(name, stored, raw_dtype=kind if value.ndim > 1 else None)

    add("token_embd.weight", module.model.embed_tokens.weight)
    add("output_norm.weight", module.model.norm.weight)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for index, layer in enumerate(module.model.layers):
        for name, stored in NAMES.items():
            add(f"blk.{index}.{stored}.weight", layer.get_submodule(name).weight, heads.get(name, 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        return module(IDS).logits


def patched() -> tuple[object, ...]:
    return gguf.GGUFReader, reader.load_gguf_checkpoint, reader.tqdm


def test_plain_weights_come_back_exactly(tmp_path: Path) -> None:
    module = original()
    before = patched()
    model = Model.from_pretrained(write(tmp_path / "m.gguf", module))
    assert patched() == before
    assert torch.equal(logits(model.module), logits(module))
    assert not model.module.training
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert (model.facts.vocab_size, model.facts.context_length) == (64, 128)
    assert model.facts.parameters == sum(one.numel() for one in module.parameters())
    assert model.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert model.source == "m.gguf"


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q4_0", "Q5_1"])
def test_quantized_weights_equal_the_reference_dequantizer(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    module = original()
    model = Model.from_pretrained(write(tmp_path / "m.gguf", module, kind))
    for theirs, ours in zip(module.parameters(), model.module.parameters(), strict=True):
        value = theirs.detach().numpy()
        if value.ndim > 1:
            value = gguf.quants.dequantize(gguf.quants.quantize(value, kind), kind)
        assert ours.dtype == torch.float32
        assert np.array_equal(ours.detach().numpy(), value)


@pytest.mark.parametrize(("stored", "asked", "given"), [
    ("F16", "auto", torch.float16), ("BF16", "auto", torch.bfloat16), ("F32", "auto", torch.float32),
    ("Q8_0", "auto", torch.float32), ("Q8_0", "bfloat16", torch.bfloat16), ("F16", "float32", torch.float32),
])  # fmt: skip
def test_dtype(tmp_path: Path, stored: str, asked: str, given: torch.dtype) -> None:
    path = write(tmp_path / "m.gguf", original(), gguf.GGMLQuantizationType[stored])
    assert {one.dtype for one in Model.from_pretrained(path, dtype=asked).module.parameters()} == {given}


def test_the_tokenizer_is_transformers_own(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", original())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = Model.from_pretrained(path).tokenizer
    assert ours is not None
    for text in ("abc a ab", "<s>ab</s>", " a", "", "漢"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), False) == theirs.decode(theirs.encode(text))
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"


def test_it_can_be_saved_and_read_by_transformers(tmp_path: Path) -> None:
    model = Model.from_pretrained(write(tmp_path / "m.gguf", original(), gguf.GGMLQuantizationType.Q8_0))
    model.save_pretrained(tmp_path / "hf")
    assert "quantization_config" not in model.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(theirs), logits(model.module))
    assert theirs.generation_config.eos_token_id == 2
    assert Model.from_pretrained(tmp_path / "hf").fingerprint() == model.fingerprint()


def test_two_loads_save_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", original(), gguf.GGMLQuantizationType.Q4_1)
    saved = [Model.from_pretrained(path).save_pretrained(tmp_path / name).manifest["files"] for name in "ab"]
    assert saved[0] == saved[1]


def test_silent_unless_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf", original())
    capfd.readouterr()
    load_gguf(path)
    assert capfd.readouterr() == ("", "")
    load_gguf(path, progress=True)
    assert "GGUF" in capfd.readouterr().err
    assert logging.getLogger("transformers").level != logging.CRITICAL


def test_a_file_without_its_usual_ending(tmp_path: Path) -> None:
    assert Model.from_pretrained(write(tmp_path / "model.bin", original())).facts.vocab_size == 64


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "m.gguf", original())
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    before = patched()
    with pytest.raises(CorruptArtifactError, match=r"m\.gguf"):
        Model.from_pretrained(path)
    assert patched() == before


@pytest.mark.timeout(20)
def test_a_header_that_lies_about_its_size(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    path.write_bytes(
        head + (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little") + b"\x04\0\0\0" + b"\xff" * 8
    )
    with pytest.raises(CorruptArtifactError, match=r"bomb\.gguf"):
        Model.from_pretrained(path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", original(), drop="blk.1.ffn_up.weight")
    before = patched()
    with pytest.raises(CorruptArtifactError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        Model.from_pretrained(path)
    assert patched() == before


def test_an_architecture_that_transformers_cannot_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", original(), architecture="rwkv6")
    with pytest.raises(UnsupportedError, match="rwkv6"):
        Model.from_pretrained(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match="does not exist"):
        Model.from_pretrained(tmp_path / "absent.gguf")


@pytest.mark.real_model
def test_smollm2(smollm2_gguf: Path, smollm2: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(smollm2_gguf)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    for expected in (7042, 30, 198, 198, 504, 2988, 314, 42):
        with torch.no_grad():
            ids.append(int(model.module(torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[-1] == expected
    assert model.fingerprint() == Model.from_pretrained(smollm2).fingerprint()
    saved = model.save_pretrained(tmp_path / "hf")
    digest = hashlib.sha256(saved.file("model.safetensors").read_bytes()).hexdigest()
    assert digest.startswith("a672150fb4f9")
    assert digest.endswith("03cd")
