"""Make a twin's parts emit one operator each, and call it with past and lengths as plain inputs."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmopt.backends.torch.cache_name import cache_name
from lmopt.backends.torch.fused.interface import MaskRule, PassingCache, watching
from lmopt.backends.torch.fused.operators import (
    Past,
    Rows,
    activate,
    group_query_attention,
    last_tokens,
    linear,
    normalize,
    take_columns,
)
from lmopt.backends.torch.fused.plan import Norm, Plan, Source
from lmopt.backends.torch.fused.reason import InexpressibleError
from lmopt.backends.torch.fused.rotary import still

_TOKENS, _FIRST = 8, 5


class FusedDecoder(nn.Module):
    """A lowered twin; `module` is the twin, so that paths in a trace begin as everywhere in lmopt.

    Args:
        twin: From `twin_of`; its parts are changed.
        plan: From `probe`.

    Attributes:
        plan: What each part becomes.
    """

    def __init__(self, twin: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.module = twin
        self.plan = plan
        self._cache_name = cache_name(twin)
        self._names: dict[int, str] = {}
        self._run: _Run | None = None
        parts = dict(twin.named_modules())
        changed: dict[str, Callable[..., Any]] = {}
        for path in plan.linears:
            changed[path] = functools.partial(self._linear, path, parts[path], parts[path].forward)
        for path, norm in plan.norms.items():
            self._hold(norm.gain, norm.bias)
            changed[path] = functools.partial(self._norm, path)
        for path, kind in plan.activations.items():
            changed[path] = functools.partial(activate, kind=kind)
        for path in plan.rotaries:
            changed[path] = still(parts[path].forward)
        for layer in plan.layers.values():
            if layer.rotary is not None:
                self._hold(layer.rotary.cos, layer.rotary.sin)
            if layer.sink is not None:
                self._hold(layer.sink)
        for path, forward in changed.items():
            parts[path].forward = forward

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        rows: Rows | None,
        state: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Read new tokens after `state`, which holds each layer's keys and values in turn.

        Args:
            input_ids: `(batch, sequence)` int64.
            position_ids: `(batch, sequence)` int64.
            rows: How long the rows are; only in a trace.
            state: `(batch, kv_heads, past, head_dim)` each.

        Returns:
            Logits and the state after the tokens.
        """
        past = dict(enumerate(zip(state[::2], state[1::2], strict=True)))
        cache = PassingCache(len(past))
        run = self._run = _Run(self, cache, past, rows)
        try:
            with watching(run):
                result = cast("Any", self.module)(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    use_cache=True,
                    **{self._cache_name: cache},
                )
        finally:
            self._run = None
        logits = last_tokens(result.logits) if self.plan.head is None else result.logits
        return logits, [tensor for layer in sorted(run.present) for tensor in run.present[layer]]

    def held(self, tensor: Tensor) -> Tensor:
        """Give a tensor of the plan as the trace knows it: as a buffer of this module."""
        return cast("Tensor", getattr(self, self._names[id(tensor)]))

    def _hold(self, *tensors: Tensor | None) -> None:
        for one in tensors:
            if one is not None and id(one) not in self._names:
                self._names[id(one)] = name = f"held_{len(self._names)}"
                self.register_buffer(name, one.detach(), persistent=False)

    def traced_norm(self, path: str) -> Norm:
        """Give a norm with its weights as the trace knows them."""
        norm = self.plan.norms[path]
        bias = None if norm.bias is None else self.held(norm.bias)
        return replace(norm, gain=self.held(norm.gain), bias=bias)

    def _linear(self, path: str, part: nn.Module, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        facts = self.plan.linears[path]
        if path == self.plan.head:
            x = last_tokens(x)
        if facts.emits_itself:
            return self._note(path, own(x))
        weight, bias = cast("Tensor", part.weight), cast("Tensor | None", getattr(part, "bias", None))
        return self._note(path, linear(x, weight, bias, stored_transposed=facts.stored_transposed))

    def _norm(self, path: str, x: Tensor) -> Tensor:
        return self._note(path, normalize(x, self.traced_norm(path)))

    def _note(self, path: str, result: Tensor) -> Tensor:
        if self._run is not None:
            self._run.seen[path] = result
        return result


class _Run:
    """One call of a lowered twin: what its attention layers find and leave."""

    def __init__(
        self,
        decoder: FusedDecoder,
        cache: PassingCache,
        past: dict[int, tuple[Tensor, Tensor]],
        rows: Rows | None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._past = past
        self._rows = rows
        self.present: dict[int, tuple[Tensor, Tensor]] = {}
        self.seen: dict[str, Tensor] = {}

    def mask(self, rule: MaskRule, query: Tensor) -> None:
        """Build no mask: the operator hides what lies ahead, and beyond a window."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """Attend by the operator, fed from as close to the linears as the plan knows."""
        assert self._cache.latest is not None
        number = self._cache.latest[0]
        layer = self._decoder.plan.layers[number]
        held = self._decoder.held
        if layer.rotary is not None:
            rotary = replace(layer.rotary, cos=held(layer.rotary.cos), sin=held(layer.rotary.sin))
            layer = replace(layer, rotary=rotary)
        if layer.sink is not None:
            layer = replace(layer, sink=held(layer.sink))
        q, k, v = (
            self._flat(heads, source)
            for heads, source in zip((query, key, value), layer.sources, strict=True)
        )
        past = Past(*self._past[number], self._rows)
        attended, present_key, present_value = group_query_attention(q, k, v, layer, past)
        self.present[number] = present_key, present_value
        return attended.view(*attended.shape[:2], layer.heads, layer.head_dim)

    def _flat(self, heads: Tensor, source: Source | None) -> Tensor:
        batch, count, tokens, size = heads.shape
        if source is None:
            return heads.transpose(1, 2).reshape(batch, tokens, count * size)
        x = take_columns(self.seen[source.path], source.columns)
        if source.head_norm is None:
            return x
        by_head = x.view(batch, tokens, count, size)
        norm = self._decoder.traced_norm(source.head_norm)
        return normalize(by_head, norm).view(batch, tokens, count * size)


def check(decoder: FusedDecoder, whole: Callable[[Tensor], Tensor], vocabulary: int, device: Any) -> None:
    """Hold a lowered twin, computed by torch, against the model itself.

    Args:
        decoder: The lowered twin.
        whole: Logits of the model for `(batch, tokens)` ids, in its own way.
        vocabulary: Number of ids.
        device: Where the weights are.

    Raises:
        InexpressibleError: They differ: something that probing did not see is at work.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (2, _TOKENS), generator=generator).to(device)
    positions = torch.arange(_TOKENS, device=device)[None].expand(2, -1)
    with torch.no_grad():
        theirs = whole(ids)
        state = [
            torch.zeros(2, layer.kv_heads, 0, layer.head_dim, dtype=theirs.dtype, device=device)
            for _, layer in sorted(decoder.plan.layers.items())
            for _ in range(2)
        ]
        first, state = decoder(ids[:, :_FIRST], positions[:, :_FIRST], None, state)
        then, _ = decoder(ids[:, _FIRST:], positions[:, _FIRST:], None, state)
    ours = torch.cat([first, then], dim=1).float()
    error = (ours - theirs.float()).abs().max().item()
    limit = (1e-3 if theirs.dtype == torch.float32 else 6e-2) * theirs.float().abs().max().item()
    if not error <= limit:
        raise InexpressibleError(
            f"rebuilt on GroupQueryAttention its logits differ by {error:.2g} (at most {limit:.2g} is rounding)"
        )
