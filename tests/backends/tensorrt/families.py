"""Tiny models of several families, and widths that their weights may have, for the real RTX compiler."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from lmopt.backends.torch.compressing import by_matrix
from lmopt.compression import Quantize
from lmopt.compression.step import Setting
from lmopt.testing import models

SIZES = {
    "vocab_size": models.VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": models.CONTEXT_LENGTH,
}


def _hugging_face(kind: str, **sizes: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)

    return make


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": models.tiny_llama,
    "gpt": models.tiny_gpt,
    "lstm": models.tiny_lstm,
    "wide": _hugging_face("Llama", hidden_size=256, num_hidden_layers=1, intermediate_size=256),
    "gpt_neox": _hugging_face("GPTNeoX", intermediate_size=64),
    "qwen3": _hugging_face("Qwen3", intermediate_size=64, num_key_value_heads=2, head_dim=8),
    "gemma2": _hugging_face(
        "Gemma2", intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=16
    ),
    "phi3": _hugging_face("Phi3", intermediate_size=64, num_key_value_heads=2, pad_token_id=0),
}
QUANTIZERS = {
    "int8": Quantize(8, 32),
    "int4": Quantize(4, 32, head=4),
    "int4-asymmetric": Quantize(4, 32, symmetric=False, head=4),
    "int8-asymmetric": Quantize(8, 32, symmetric=False),
    "int4-64": Quantize(4, 64, head=4),
    "int4-128": Quantize(4, 128, head=4),
    "int8-rounded": Quantize(8, 32, activations=8),
}


def make(family: str, precision: str) -> torch.nn.Module:
    """Build a tiny model in a precision: `float16`, or `float16+int4` for 4-bit weights beside it."""
    dtype, _, weights = precision.partition("+")
    module = FAMILIES[family]().to(getattr(torch, dtype))
    return by_matrix(module, QUANTIZERS[weights], Setting(models.VOCAB_SIZE)) if weights else module
