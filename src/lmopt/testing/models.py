"""Seeded tiny language models, built in code: no download, the same weights on every machine.

Their weights are drawn larger than a training would start from, so that logits spread over a unit
and depend on every earlier token: an engine that loses a token, a position or a row cannot
stay within the tolerances by luck.
"""

from typing import TYPE_CHECKING, Any, Final

from lmopt.errors import NotInstalledError
from lmopt.registry import pip_line

if TYPE_CHECKING:
    from torch import Tensor, nn

VOCAB_SIZE: Final = 97
CONTEXT_LENGTH: Final = 128
_HIDDEN: Final = 32
_LAYERS: Final = 2
_HEADS: Final = 4
_TORCH: Final = '"lmopt[torch]"'
_BOTH: Final = '"lmopt[torch,onnx]"'


def tiny_llama(seed: int = 0) -> "nn.Module":
    """Build a random two-layer `LlamaForCausalLM` (grouped queries, rotary positions).

    Args:
        seed: The same seed gives the same weights.

    Raises:
        NotInstalledError: torch or transformers is missing.
    """
    require_torch()
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise NotInstalledError(
            f"the tiny Llama needs transformers, which this Python lacks: {pip_line(_TORCH)}"
        ) from error
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=_HIDDEN,
        intermediate_size=2 * _HIDDEN,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS // 2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return seeded(lambda: LlamaForCausalLM(config), seed)


def tiny_gpt(seed: int = 0) -> "nn.Module":
    """Build a random hand-written GPT that meets `LanguageModel`: key-value cache, mask, positions.

    Args:
        seed: The same seed gives the same weights.

    Raises:
        NotInstalledError: torch is missing.
    """
    require_torch()
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(_HIDDEN), nn.LayerNorm(_HIDDEN)
            self.qkv, self.out = nn.Linear(_HIDDEN, 3 * _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN)
            self.up, self.down = nn.Linear(_HIDDEN, 4 * _HIDDEN), nn.Linear(4 * _HIDDEN, _HIDDEN)

        def forward(
            self, hidden: "Tensor", blocked: "Tensor", past: "tuple[Tensor, Tensor]"
        ) -> "tuple[Tensor, tuple[Tensor, Tensor]]":
            batch, sequence, _ = hidden.shape
            heads = self.qkv(self.norm_1(hidden)).view(batch, sequence, 3, _HEADS, -1)
            query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
            scores = query @ key.transpose(2, 3) / key.shape[-1] ** 0.5
            # The least number and not -inf: a row that sees nothing must not become NaN.
            weights = scores.masked_fill(blocked, torch.finfo(scores.dtype).min).softmax(-1)
            hidden = hidden + self.out((weights @ value).transpose(1, 2).reshape(batch, sequence, -1))
            return hidden + self.down(functional.gelu(self.up(self.norm_2(hidden)))), (key, value)

    class TinyGpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCAB_SIZE, _HIDDEN)
            self.positions = nn.Embedding(CONTEXT_LENGTH, _HIDDEN)
            self.blocks = nn.ModuleList(Block() for _ in range(_LAYERS))
            self.norm, self.head = nn.LayerNorm(_HIDDEN), nn.Linear(_HIDDEN, VOCAB_SIZE, bias=False)

        def forward(
            self,
            input_ids: "Tensor",
            state: "list[tuple[Tensor, Tensor]] | None" = None,
            attention_mask: "Tensor | None" = None,
            position_ids: "Tensor | None" = None,
        ) -> "tuple[Tensor, list[tuple[Tensor, Tensor]]]":
            batch, sequence = input_ids.shape
            hidden = self.tokens(input_ids)
            if state is None:
                empty = hidden.new_zeros(batch, _HEADS, 0, _HIDDEN // _HEADS)
                state = [(empty, empty)] * _LAYERS
            past = state[0][0].shape[2]
            slots = torch.arange(past + sequence, device=input_ids.device)
            blocked = (slots[None] > slots[past:, None])[None, None]
            if attention_mask is not None:
                blocked = blocked | (attention_mask[:, None, None] == 0)
            hidden = hidden + self.positions(slots[past:][None] if position_ids is None else position_ids)
            after = []
            for block, layer in zip(self.blocks, state, strict=True):
                hidden, layer_after = block(hidden, blocked, layer)
                after.append(layer_after)
            return self.head(self.norm(hidden)), after

    return seeded(TinyGpt, seed)


def tiny_lstm(seed: int = 0) -> "nn.Module":
    """Build a random tutorial language model: `Embedding -> LSTM -> Linear`, no mask, fixed state.

    Args:
        seed: The same seed gives the same weights.

    Raises:
        NotInstalledError: torch is missing.
    """
    require_torch()
    from torch import nn

    class TinyLstm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCAB_SIZE, _HIDDEN)
            self.lstm = nn.LSTM(_HIDDEN, _HIDDEN, num_layers=_LAYERS, batch_first=True)
            self.head = nn.Linear(_HIDDEN, VOCAB_SIZE)

        def forward(
            self, input_ids: "Tensor", state: "tuple[Tensor, Tensor] | None" = None
        ) -> "tuple[Tensor, tuple[Tensor, Tensor]]":
            hidden, after = self.lstm(self.embedding(input_ids), state)
            return self.head(hidden), after

    # Gates squash what they read: a larger gain keeps distant tokens in the logits.
    return seeded(TinyLstm, seed, gain=2.0)


def require_torch() -> None:
    """Raise `NotInstalledError` with the pip line where torch is missing."""
    try:
        import torch as torch
    except ImportError as error:
        raise NotInstalledError(
            "lmopt.testing builds its models with torch and exports them with onnx, which this Python lacks: "
            f"{pip_line(_BOTH)}"
        ) from error


def seeded(build: Any, seed: int, gain: float = 1.0) -> "nn.Module":
    """Build a module and draw its weights from a generator of its own, leaving torch's alone."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        module: nn.Module = build().eval().requires_grad_(False)
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    for parameter in module.parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(draw)
        elif parameter.dim() > 1:
            # A matrix keeps the size of what it maps. Much more, and half types lose the tolerance.
            parameter.copy_(gain * parameter.shape[-1] ** -0.5 * draw)
        else:
            # A norm's gain stays near its 1, a bias near its 0.
            parameter.copy_(float(bool((parameter == 1).all())) + 0.2 * draw)
    return module
