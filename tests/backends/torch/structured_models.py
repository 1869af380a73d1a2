"""Small models of many families, and pieces of them that carry nothing."""

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from lmopt.compression.step import Setting
from lmopt.testing.models import VOCAB_SIZE, tiny_gpt, tiny_llama, tiny_lstm

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 89], [2, 4, 8, 16, 32, 64, 31, 62]])
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# More fields than one layer of each kind shows: windows alternate.
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SIZES),
    "llama-tied": ("Llama", {**_SIZES, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", _SIZES),
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 8}),
    "phi3": ("Phi3", _SIZES),
    "gemma2": ("Gemma2", {**_SIZES, "head_dim": 8, "sliding_window": 4}),
    "olmo2": ("Olmo2", _SIZES),
    "mixtral": ("Mixtral", {**_SIZES, "num_local_experts": 4}),
    "gpt-oss": ("GptOss", {**_SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def family(name: str, **changes: Any) -> nn.Module:
    """Build a random model of a family, with logits that spread."""
    if name in ("tiny-gpt", "tiny-llama", "tiny-lstm"):
        return {"tiny-gpt": tiny_gpt, "tiny-llama": tiny_llama, "tiny-lstm": tiny_lstm}[name]()
    torch.manual_seed(0)
    if name == "gpt2":
        module: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**_GPT2, **changes}))
    else:
        kind, sizes = _FAMILIES[name]
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
        module = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    return module.eval()


class Stacked(nn.Module):
    """A hand-written model that maps ids to logits and leaves its depth and widths open."""

    def __init__(self, seed: int = 0, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(VOCAB_SIZE, 16)
        self.parts = nn.ModuleList(StackedBlock(place) for place in range(blocks))
        self.head = nn.Linear(16, VOCAB_SIZE)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.table(input_ids)
        for part in self.parts:
            hidden = part(hidden)
        logits: Tensor = self.head(hidden)
        return logits


class StackedBlock(nn.Module):
    """A block that mixes the tokens so far and then each with itself."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden: Tensor) -> Tensor:
        counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        result: Tensor = hidden + self.down(torch.relu(self.up(self.norm(hidden.cumsum(1) / counts))))
        return result


def setting(rows: int = 8, tokens: int = 32, **changes: Any) -> Setting:
    """Random calibration rows."""
    random = np.random.default_rng(0)
    return Setting(VOCAB_SIZE, [random.integers(0, VOCAB_SIZE, tokens) for _ in range(rows)], **changes)


def logits(module: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Logits of a module, however it returns them."""
    with torch.no_grad():
        result: Any = module(ids)
    if isinstance(result, tuple):
        result = result[0]
    found: Tensor = result if isinstance(result, Tensor) else result.logits
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference of logits."""
    return float((one - other).abs().max())
