"""Which parts of a model are split over ranks, and into how many parts they can be split."""

import math
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from lmopt.backends.torch.language_model import is_transformers
from lmopt.backends.torch.quantized import Quantized
from lmopt.errors import UnsupportedError, UnsupportedOptionError

STYLES: Final = ("colwise", "rowwise", "colwise_gather")
"""How a linear of an own module is split: by outputs, by inputs (its result is summed up), or by outputs that are
put together again."""


def check_module(module: nn.Module, size: int, plan: Mapping[str, str] | None) -> None:
    """Refuse what cannot be split, before any process is started.

    Args:
        module: The whole model.
        size: Ranks.
        plan: What the caller wants split, for own modules.

    Raises:
        UnsupportedOptionError: The size does not divide the heads, or the plan is none.
        UnsupportedError: The model has no plan, or parts that no plan knows.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UnsupportedOptionError(
            f"tensor_parallel_size={size!r} is not possible; expected a whole number >= 1"
        )
    name = type(module).__name__
    if parts := [path for path, part in module.named_modules() if isinstance(part, Quantized)]:
        raise UnsupportedError(
            f"{parts[0]} of {name} is quantized, which tensor parallelism cannot split. Use the original model, or "
            "leave tensor_parallel_size out."
        )
    if is_transformers(module):
        _check_transformers(module, size, plan)
    else:
        _check_plan(module, plan)


def _check_transformers(module: Any, size: int, plan: Mapping[str, str] | None) -> None:
    name = type(module).__name__
    if plan is not None:
        raise UnsupportedOptionError(
            f"tensor_parallel_plan is for own modules; {name} of transformers has its own"
        )
    if not getattr(module, "_tp_plan", None):
        raise UnsupportedError(
            f"transformers has no tensor-parallel plan for {name}, so it cannot be split. Leave "
            "tensor_parallel_size out."
        )
    config = module.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    common = math.gcd(heads, groups)
    if common % size:
        fits = [one for one in range(2, common + 1) if common % one == 0]
        raise UnsupportedOptionError(
            f"tensor_parallel_size={size} does not divide the {heads} attention heads and {groups} key-value heads of "
            f"{name}; {_sizes(fits)}"
        )


def _sizes(fits: list[int]) -> str:
    if not fits:
        return "no size does: leave it out"
    return f"possible: {', '.join(map(str, fits))}"


def _check_plan(module: nn.Module, plan: Mapping[str, str] | None) -> None:
    name = type(module).__name__
    if not plan:
        raise UnsupportedOptionError(
            f"{name} is an own module: say what is to be split, such as "
            'tensor_parallel_plan={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}. Recurrent layers cannot be.'
        )
    for pattern, style in plan.items():
        if style not in STYLES:
            raise UnsupportedOptionError(
                f"tensor_parallel_plan: {style!r} of {pattern!r} is unknown; choose one of {', '.join(STYLES)}"
            )
