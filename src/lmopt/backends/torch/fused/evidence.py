"""Tell what a part of a model computes by what comes out of it, not by its name."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmopt.backends.torch.fused.operators import ACTIVATIONS, compute_activation
from lmopt.backends.torch.fused.plan import Linear, Norm
from lmopt.backends.torch.quantized import QuantizedLinear

# Relative and absolute difference that the order of operations alone explains.
_ROUNDING: Final = {torch.float32: 2e-5, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Say whether two results differ by rounding only, measured against their own size."""
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return False
    size = theirs.float().abs().max().clamp_min(1e-6)
    limit = _ROUNDING.get(theirs.dtype, 2e-5)
    return bool(((ours.float() - theirs.float()).abs().max() <= limit * size).item())


def find_norm(part: nn.Module) -> Norm | None:
    """Recognise a normalisation with gains, and maybe a bias, of its last axis."""
    weights = list(part.parameters())
    if not 1 <= len(weights) <= 2 or any(one.shape != weights[0].shape for one in weights):
        return None
    gain = weights[0]
    if gain.dim() != 1:
        return None
    epsilons = [one for one in vars(part).values() if isinstance(one, float) and 0 < one < 0.1]
    epsilons.append(torch.finfo(gain.dtype).eps)
    bias = weights[1].data if len(weights) == 2 else None
    # The second input is so small that a wrong epsilon shows.
    tries = [_random(gain, 4, len(gain)), _random(gain, 4, len(gain)) * 1e-3]
    try:
        theirs = [part(one) for one in tries]
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    if not all(isinstance(one, Tensor) for one in theirs):
        return None
    for kind in ("rms", "layer"):
        for factors in (gain.data, 1 + gain.data):
            for epsilon in dict.fromkeys(epsilons):
                norm = Norm(kind, factors, bias, epsilon)
                if all(agree(norm.compute(x), y) for x, y in zip(tries, theirs, strict=True)):
                    # Root mean square with a bias has no operator.
                    return None if kind == "rms" and bias is not None else norm
    return None


def find_linear(part: nn.Module) -> Linear | None:
    """Recognise a matrix product with a weight as `nn.Linear` or as GPT-2's `Conv1D` stores it."""
    if isinstance(part, QuantizedLinear):
        return Linear(emits_itself=True)
    weights = dict(part.named_parameters())
    weight, bias = weights.pop("weight", None), weights.pop("bias", None)
    if weight is None or weight.dim() != 2 or weights or (bias is not None and bias.dim() != 1):
        return None
    if type(part) is nn.Linear:
        return Linear()
    for stored_transposed in (False, True):
        matrix = weight.t() if stored_transposed else weight
        if bias is not None and len(bias) != len(matrix):
            continue
        x = _random(weight, 3, matrix.shape[1])
        try:
            theirs = part(x)
        except (RuntimeError, IndexError):
            continue
        if isinstance(theirs, Tensor) and agree(functional.linear(x, matrix, bias), theirs):
            return Linear(stored_transposed)
    return None


def find_activation(part: nn.Module, sample: Tensor) -> str | None:
    """Recognise an activation that has an operator.

    Args:
        part: A part without weights.
        sample: Something that it was given, for shape and type.
    """
    # From far below to far above the bend.
    x = torch.linspace(-8, 8, sample.numel(), dtype=sample.dtype, device=sample.device).reshape(sample.shape)
    theirs = part(x)
    if not isinstance(theirs, Tensor) or theirs.shape != x.shape:
        return None
    return next((kind for kind in ACTIVATIONS if agree(compute_activation(x, kind), theirs)), None)


def _random(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like)
