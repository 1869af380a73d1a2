"""Train a model with zeroed weights so that they stay zero."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lmopt.backends.torch.quantizing import find_weights


@contextmanager
def keeping_zeros(module: nn.Module, vocab_size: int) -> Iterator[dict[str, float]]:
    """Let the linear weights that are exactly 0 stay 0 while the module is trained.

    Their gradient is set to 0 as soon as it is there. AdamW then never moves them: both of its means stay 0, and
    weight decay takes nothing off 0. Embeddings and heads are left alone, since no step prunes them.

    Args:
        module: The module that is trained; its weights must not be put on another device by copying meanwhile.
        vocab_size: Width of the logits.

    Yields:
        Share of zeros by path, for each linear that has any.
    """
    found: dict[str, float] = {}
    with ExitStack() as hooks:
        for one in find_weights(module, vocab_size):
            # Any: nn.Module's attributes are tensors or modules to a type checker.
            part: Any = module.get_submodule(one.path)
            weight: Tensor = part.weight
            if one.part != "linear" or one.tied is not None or not weight.requires_grad:
                continue
            kept = weight.detach() != 0
            share = 1 - float(kept.float().mean())
            if share > 0:
                found[one.path] = share
                handle = weight.register_hook(_masked(kept))  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)
        yield found


def _masked(kept: Tensor) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        return gradient * kept.to(gradient.device)

    return hook
