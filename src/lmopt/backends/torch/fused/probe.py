"""Run a twin of a model on a few tokens and find out what its parts compute.

Two runs: one as the model is, one in which the parts that make rotary angles answer "no rotation" and
every attention answers what it answered before. So all that differs between the runs at an
attention layer is the rotation, and what enters it unrotated can be followed back to a linear, bit
by bit, however the model cuts and turns it in between.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

from lmopt.backends.torch.cache_name import cache_name
from lmopt.backends.torch.fused.evidence import find_activation, find_linear, find_norm
from lmopt.backends.torch.fused.interface import PassingCache, watching
from lmopt.backends.torch.fused.plan import Layer, Linear, Norm, Plan, Rotary
from lmopt.backends.torch.fused.reason import InexpressibleError
from lmopt.backends.torch.fused.recording import AttentionCall, Recorder
from lmopt.backends.torch.fused.rotary import RotaryTables, without_rotation
from lmopt.backends.torch.fused.sources import Seen, find_source
from lmopt.backends.torch.language_model import device_of

_BATCH: Final = 2
_TOKENS: Final = 7


def probe(twin: Any, *, layers: int, vocabulary: int, context: int) -> Plan:
    """Find out what each part of a twin computes.

    Args:
        twin: A transformers model from `twin_of`, routed through `interface`.
        layers: Attention layers that keep keys and values.
        vocabulary: Number of ids.
        context: Positions that rotary tables must hold.

    Raises:
        InexpressibleError: Something has no operator; the message says what.
    """
    parts: dict[str, nn.Module] = dict(twin.named_modules())
    run = _run(twin, parts, layers, vocabulary)
    numbers = [call.layer for call in run.calls]
    if sorted(numbers) != list(range(layers)):
        raise InexpressibleError(
            f"{layers} layers keep keys and values, but {len(set(numbers))} attend through transformers' interface"
        )
    seen = [one for call in run.calls for one in call.before] + run.leaves
    linears, norms, activations = _classify(parts, seen)
    rotary_paths = tuple(dict.fromkeys(one.path for one in run.angles))
    plain = run
    if rotary_paths:
        with without_rotation([parts[path] for path in rotary_paths]):
            plain = _run(twin, parts, layers, vocabulary, run.calls)
    tables = RotaryTables(run.angles, parts, _positions(twin), context)
    found: dict[int, Layer] = {}
    outside = False
    for one, bare in zip(run.calls, plain.calls, strict=True):
        rotated = not (torch.equal(one.query, bare.query) and torch.equal(one.key, bare.key))
        rotary = tables.find([(one.query, bare.query), (one.key, bare.key)]) if rotated else None
        outside = outside or (rotated and rotary is None)
        found[one.layer] = _layer(one, bare, rotary, linears, norms)
    if outside:
        # One rotation that stays in the trace needs the angles, so all of them stay.
        found = {one.layer: _layer(one, one, None, linears, norms) for one in run.calls}
    head = twin.get_output_embeddings()
    return Plan(
        layers=found,
        linears=linears,
        norms=norms,
        activations=activations,
        rotaries=() if outside else rotary_paths,
        head=next((path for path, part in parts.items() if part is head and path in linears), None),
    )


def _run(
    twin: Any,
    parts: dict[str, nn.Module],
    layers: int,
    vocabulary: int,
    replay: list[AttentionCall] | None = None,
) -> Recorder:
    device = device_of(twin)
    cache = PassingCache(layers)
    recorder = Recorder(cache, replay)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (_BATCH, _TOKENS), generator=generator).to(device)
    hooks = [
        part.register_forward_hook(recorder.watch(path, part), with_kwargs=True)
        for path, part in parts.items()
    ]
    try:
        with torch.no_grad(), watching(recorder):
            twin(input_ids=ids, position_ids=_positions(twin), use_cache=True, **{cache_name(twin): cache})
    finally:
        for hook in hooks:
            hook.remove()
    return recorder


def _positions(twin: nn.Module) -> Tensor:
    return torch.arange(_TOKENS, device=device_of(twin))[None].expand(_BATCH, -1).contiguous()


def _classify(
    parts: dict[str, nn.Module], seen: list[Seen]
) -> tuple[dict[str, Linear], dict[str, Norm], dict[str, str]]:
    linears: dict[str, Linear] = {}
    norms: dict[str, Norm] = {}
    activations: dict[str, str] = {}
    for path, first in {one.path: one for one in reversed(seen)}.items():
        part = parts[path]
        weights = [*part.parameters(), *part.buffers()]
        with torch.no_grad():
            if not first.input.is_floating_point():
                continue
            if not weights:
                # The operators of activations have kernels for float32 only.
                if first.input.dtype == torch.float32 and (kind := find_activation(part, first.input)):
                    activations[path] = kind
            elif linear := find_linear(part):
                linears[path] = linear
            elif norm := find_norm(part):
                norms[path] = norm
    return linears, norms, activations


def _layer(
    call: AttentionCall,
    bare: AttentionCall,
    rotary: Rotary | None,
    linears: dict[str, Linear],
    norms: dict[str, Norm],
) -> Layer:
    options = call.options
    heads, head_dim = call.query.shape[1], call.query.shape[-1]
    kv_heads = call.key.shape[1]
    if call.value.shape != call.key.shape:
        raise InexpressibleError(
            f"its keys have {call.key.shape[-1]} entries a head and its values {call.value.shape[-1]} "
            "(latent attention, say); GroupQueryAttention needs equal ones"
        )
    scale = options.get("scaling")
    sources = tuple(
        find_source(one, bare.before, linears, norms) for one in (bare.query, bare.key, bare.value)
    )
    return Layer(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=float(head_dim**-0.5 if scale is None else scale),
        window=call.window,
        softcap=options.get("softcap"),
        sink=options.get("s_aux"),
        rotary=rotary,
        sources=sources,  # type: ignore[arg-type]
    )
