"""Recover a model by low-rank adapters (LoRA) that are merged into its weights afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lmopt.backends.torch.language_model import is_transformers
from lmopt.backends.torch.quantized import Quantized, QuantizedEmbedding, QuantizedLinear, quantized_parts
from lmopt.backends.torch.quantizing import find_weights, set_part
from lmopt.errors import NotInstalledError, UnsupportedError, UnsupportedOptionError
from lmopt.registry import pip_line
from lmopt.training.quantization_aware import round_on


@contextmanager
def adapters(
    module: nn.Module, vocab_size: int, *, rank: int, alpha: float | None = None
) -> Iterator[list[str]]:
    """Put trainable adapters beside a module's linears; merge them into the weights on leaving.

    All other weights are frozen meanwhile. Quantized linears are trained beside their dequantized weight; merged,
    they are rounded to the nearest values of their own grid (same bits, groups, scales and zeros), which loses part of
    what was learnt: measure it. Zeroed weights do not stay zero. After an error the adapters are taken off unmerged.

    Args:
        module: The module; it is changed in place and plain again on leaving.
        vocab_size: Width of the logits.
        rank: Width of the adapters, at least 1.
        alpha: Adapters are scaled by `alpha / rank`; `None` takes `2 * rank`.

    Yields:
        Paths of the linears that have an adapter.

    Raises:
        NotInstalledError: peft is missing.
        UnsupportedOptionError: The rank is impossible.
        UnsupportedError: There is no linear to train beside.

    References:
        Hu et al. 2022, LoRA, arXiv:2106.09685.
    """
    peft = _peft()
    if type(rank) is not int or rank < 1:
        raise UnsupportedOptionError(
            f"lora_rank is {rank!r}; expected a whole number of at least 1, such as 16"
        )
    asked = {one: one.requires_grad for one in module.parameters()}
    grids = _dequantized(module)
    done = False
    try:
        linears = [one.path for one in find_weights(module, vocab_size) if one.part == "linear"]
        if not linears:
            raise UnsupportedError(
                f"{type(module).__name__} has no linear that an adapter could be put beside"
            )
        settings = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank if alpha is None else alpha, target_modules=linears
        )
        settings.fan_in_fan_out = False
        tuner = peft.LoraModel(module, settings, "default")
        try:
            yield linears
            done = True
        finally:
            # Both change the module in place; the tuner itself is only a handle on it.
            tuner.merge_and_unload(safe_merge=True) if done else tuner.unload()
            # Marks that peft leaves on a transformers model, by which it would be saved as an adapter.
            for name in ("peft_config", "_hf_peft_config_loaded"):
                module.__dict__.pop(name, None)
    finally:
        _requantized(module, grids, keep=not done)
        for one, before in asked.items():
            one.requires_grad_(before)
        module.eval()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        extra = '"lmopt[train]"'
        raise NotInstalledError(f"LoRA needs peft, which this Python lacks: {pip_line(extra)}") from error
    return peft


def _dequantized(module: nn.Module) -> dict[str, Quantized]:
    """Put plain linears in the place of quantized ones that read hidden states; give the parts that were there."""
    found = quantized_parts(module)
    # A tied head is the embedding's weight, and neither gets an adapter: both stay as they are.
    tables = {part.codes.data_ptr() for part in found.values() if isinstance(part, QuantizedEmbedding)}
    head = module.get_output_embeddings() if is_transformers(module) else None  # type: ignore[operator]
    replaced: dict[str, Quantized] = {}
    for path, part in found.items():
        if not isinstance(part, QuantizedLinear) or part.codes.data_ptr() in tables or part is head:
            continue
        plain = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None, device="meta")
        plain.weight = nn.Parameter(part.weight.detach().clone(), requires_grad=False)
        if part.bias is not None:
            plain.bias = nn.Parameter(part.bias.detach().clone(), requires_grad=False)
        set_part(module, path, plain)
        replaced[path] = part
    return replaced


def _requantized(module: nn.Module, grids: dict[str, Quantized], *, keep: bool) -> None:
    """Put quantized parts back, rounded to what their linears have become, or as they were."""
    for path, part in grids.items():
        if not keep:
            plain: Any = module.get_submodule(path)
            assert isinstance(part, QuantizedLinear)
            with torch.no_grad():
                array = round_on(part, plain.weight.detach().float())
            made = QuantizedLinear(array, part.bias, activations=part.activations)
            part = made.to(part.codes.device)
        set_part(module, path, part)
