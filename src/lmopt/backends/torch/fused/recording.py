"""Write down what a run of a twin does at its attention layers, its leaves and its masks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmopt.backends.torch.fused.interface import MaskRule, PassingCache
from lmopt.backends.torch.fused.reason import InexpressibleError
from lmopt.backends.torch.fused.rotary import AngleCall, is_angles
from lmopt.backends.torch.fused.sources import Seen

# Where masks are looked at, and how far back: beyond every window in use.
_PLACES: Final = (0, 1, 6, 100, 4095, 100_000, 1 << 20)
_FARTHEST: Final = 1 << 18

# What an attention function is given that changes nothing, or that is read from elsewhere.
_READ: Final = frozenset({"scaling", "softcap", "s_aux"})
_CARRIED: Final = frozenset(
    {
        "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "dropout", "is_causal", "max_length_k",
        "max_length_q", "output_attentions", "output_router_logits", "position_embeddings", "position_ids",
        "sliding_window", "use_cache",
    }
)  # fmt: skip


@dataclass(slots=True)
class AttentionCall:
    """One attention as it was called."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    window: int | None
    options: dict[str, Any]
    attended: Tensor
    before: list[Seen]


@dataclass(slots=True)
class Recorder:
    """Writes down what a run of the twin does.

    Attributes:
        cache: The cache of the run.
        replay: Calls of an earlier run, to answer alike.
    """

    cache: PassingCache
    replay: list[AttentionCall] | None = None
    calls: list[AttentionCall] = field(default_factory=list)
    leaves: list[Seen] = field(default_factory=list)
    angles: list[AngleCall] = field(default_factory=list)
    windows: dict[int, int | None] = field(default_factory=dict)
    _masks: list[Tensor] = field(default_factory=list)  # alive, so that no two have one address

    def mask(self, rule: MaskRule, query: Tensor) -> Tensor:
        """Find out the window of a mask; the tensor returned stands for it."""
        token = torch.zeros(1, 1, query.shape[1], query.shape[1], dtype=query.dtype, device=query.device)
        self._masks.append(token)
        self.windows[token.untyped_storage().data_ptr()] = window_of(rule)
        return token

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """Write down an attention's arguments."""
        latest = self.cache.latest
        if latest is None or latest[1] is not key or latest[2] is not value:
            raise InexpressibleError(
                "an attention layer reads other keys and values than it stores (latent attention, or layers "
                "that share them)"
            )
        if mask is None or (where := mask.untyped_storage().data_ptr()) not in self.windows:
            raise InexpressibleError("an attention layer is given a mask that transformers did not build")
        strange = [n for n, v in options.items() if v is not None and n not in _READ | _CARRIED]
        if strange:
            raise InexpressibleError(f"its attention takes {strange[0]!r}, which GroupQueryAttention lacks")
        if self.replay is None:
            attended = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=options.get("scaling"), enable_gqa=True
            ).transpose(1, 2)
        else:
            attended = self.replay[len(self.calls)].attended
        self.calls.append(
            AttentionCall(latest[0], query, key, value, self.windows[where], options, attended, self.leaves)
        )
        self.leaves = []
        return attended

    def watch(self, path: str, part: nn.Module) -> Callable[..., None]:
        """Make a forward hook that writes down a part's input and output."""
        is_leaf = not any(part.children())

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if is_angles(output):
                self.angles.append(AngleCall(path, args, kwargs, output))
            elif is_leaf and isinstance(output, Tensor) and len(args) == 1 and isinstance(args[0], Tensor):
                self.leaves.append(Seen(path, args[0], output))

        return hook


def window_of(rule: MaskRule) -> int | None:
    """Find how many keys a mask lets a query see; `None` for all up to itself.

    Raises:
        InexpressibleError: It is neither causal nor a causal window.
    """
    row, head = torch.zeros(1, 1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, 1, dtype=torch.int64)
    widths: list[tuple[int, int]] = []
    for place in _PLACES:
        key = torch.arange(max(0, place - _FARTHEST), place + 8)
        sees = rule(row, head, torch.tensor(place).reshape(1, 1, 1, 1), key[None, None, None]).flatten()
        width = int(sees.sum())
        if not torch.equal(sees, (key <= place) & (key > place - width)):
            raise InexpressibleError("its mask is neither causal nor a causal window")
        widths.append((width, int((key <= place).sum())))
    window = min((width for width, there in widths if width < there), default=None)
    if any(width != there and width != window for width, there in widths) or any(
        width > window for width, _ in widths if window is not None
    ):
        raise InexpressibleError("how far its mask reaches depends on the position (chunked attention, say)")
    return window
