"""Folders and grids for the tests of foreign formats; nothing here uses lmopt's own packing of them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmopt.backends.torch.quantized import Quantized
from lmopt.backends.torch.quantizing import Weight, find_weights, replace_weights
from lmopt.compression.layout import QuantizedArray, quantize
from lmopt.testing.models import VOCAB_SIZE, tiny_llama
from lmopt.types import FloatArray

IDS = torch.tensor([[1, 5, 9, 40, 2, 77]])
Q = "model.layers.0.self_attn.q_proj"


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        return module(IDS).logits


def small_llama(
    bits: int = 4,
    group_size: int = 16,
    symmetric: bool = True,
    *,
    parts: tuple[str, ...] = ("linear",),
    of: Callable[[Weight], tuple[int, int]] | None = None,
    module: Any = None,
) -> Any:
    """Round a tiny llama's weights to the nearest codes."""
    module = module or tiny_llama()

    def round_off(weight: Weight, matrix: FloatArray) -> QuantizedArray | None:
        if weight.part not in parts:
            return None
        form = (bits, group_size) if of is None else of(weight)
        return quantize(matrix, *form, symmetric=symmetric)

    return replace_weights(copy.deepcopy(module), find_weights(module, VOCAB_SIZE), round_off)


def llama_of(dtype: torch.dtype) -> Any:
    """A tiny llama in another type, but for its rotary frequencies, as transformers loads it."""
    module: Any = tiny_llama()
    other = type(module)._from_config(module.config, dtype=dtype).eval().requires_grad_(False)
    other.load_state_dict(module.state_dict())
    return other


def tied_llama() -> Any:
    module = tiny_llama()
    module.lm_head.weight = module.model.embed_tokens.weight
    module.config.tie_word_embeddings = True
    return module


def llama_of_32s() -> Any:
    """A tiny llama whose linears all have a multiple of 32 outputs, as GPTQ's packers need."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def write_folder(
    folder: Path, described: Any, pack: Callable[[str, nn.Linear], dict[str, Tensor]], module: Any = None
) -> tuple[Path, Any]:
    """Write a llama whose linears, but for the head, are stored as `pack` says."""
    module = module or llama_of_32s()
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for path, part in module.named_modules():
        if isinstance(part, nn.Linear) and path != "lm_head":
            del tensors[f"{path}.weight"]
            tensors |= {f"{path}.{name}": tensor for name, tensor in pack(path, part).items()}
    folder.mkdir()
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(module.dtype).removeprefix("torch.")
    config["quantization_config"] = described
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, module


def change_config(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return damage


def change_tensors(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        tensors = {name: one.clone().contiguous() for name, one in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def same_values(one: Quantized, values: FloatArray) -> bool:
    return one.weight.dtype == torch.float32 and np.array_equal(one.weight.numpy(), values)
