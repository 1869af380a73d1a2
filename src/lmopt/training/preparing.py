"""Make a module ready to be trained, and put back afterwards what was changed for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lmopt.backends.torch.language_model import as_decoder, device_of
from lmopt.errors import UnsupportedError
from lmopt.training.config import TrainingConfig

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def trainable(module: nn.Module, config: TrainingConfig) -> Iterator[None]:
    """Put a module into training mode.

    Where no weight asks for a gradient, as after loading for inference, all are trained; else those that do.
    On leaving, the module is in evaluation mode on its old device, and asks for the gradients that it asked for.

    Raises:
        UnsupportedError: It has nothing to train, or cannot do what `config` asks for.
    """
    asked = {one: one.requires_grad for one in module.parameters()}
    home = device_of(module)
    if not any(asked.values()):
        for one in asked:
            one.requires_grad_(one.is_floating_point())
    saving = False
    try:
        _check(module, config)
        if config.gradient_checkpointing:
            _checkpoint_blocks(module, True)
            saving = True
        module.train()
        yield
    finally:
        if saving:
            _checkpoint_blocks(module, False)
        module.eval()
        module.zero_grad(set_to_none=True)
        for one, before in asked.items():
            one.requires_grad_(before)
        module.to(home)


def _check(module: nn.Module, config: TrainingConfig) -> None:
    name = type(module).__name__
    trained = {path: one for path, one in module.named_parameters() if one.requires_grad}
    if not trained:
        raise UnsupportedError(
            f"{name} has no weight that could be trained: quantized weights are fixed. Train the float model and "
            "quantize it afterwards, or train adapters beside it."
        )
    if half := [path for path, one in trained.items() if one.dtype in _HALF]:
        kind = str(trained[half[0]].dtype).removeprefix("torch.")
        raise UnsupportedError(
            f"{half[0]} of {name} is {kind}, which loses updates smaller than a few thousandths of a weight. Load it "
            "with Model.from_pretrained(..., dtype='float32'); bf16=True then computes in bfloat16."
        )
    if config.carry_state and not _is_recurrent(module):
        raise UnsupportedError(
            f"carry_state is for recurrent models; the state of {name} grows with the text, or it has none. Leave "
            "carry_state out: rows are then shuffled blocks."
        )


def _is_recurrent(module: nn.Module) -> bool:
    """Say whether a module's state keeps its size."""
    module.eval()
    state = as_decoder(module).signature.state
    return bool(state) and all(one.past_axis is None for one in state)


def _checkpoint_blocks(module: nn.Module, on: bool) -> None:
    # Any: nn.Module's attributes are tensors or modules to a type checker.
    model: Any = module
    # transformers 5.23 renamed it; own modules may offer either.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next((one for one in names if hasattr(module, f"{one}_enable")), None)
    if name is None or not getattr(module, "supports_gradient_checkpointing", True):
        raise UnsupportedError(
            f"{type(module).__name__} offers no gradient checkpointing: it has no gradient_checkpointing_enable(). "
            "Leave gradient_checkpointing out, or use torch.utils.checkpoint inside its forward."
        )
    getattr(model, f"{name}_{'enable' if on else 'disable'}")()
