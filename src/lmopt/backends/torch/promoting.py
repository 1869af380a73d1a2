"""Spare torch's exporter the search for casts in programs that have all they need: a sixth of an export's time.

Where operands are of different types, torch casts as it computes and ONNX does not, so `torch.onnx` writes these casts
down. To find them it computes a program once more, on tensors without data; but which types a program's values have,
and what its rules make of them, can be read off.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from lmopt.backends.torch.registering import replacing

_NAME: Final = "insert_type_promotion_nodes"


@contextlib.contextmanager
def promoted_where_needed() -> Iterator[None]:
    """Let torch's exporter look for casts only where there are some; where torch has moved the places, always."""
    try:
        from torch.onnx._internal.exporter import _fx_passes
        from torch.onnx._internal.fx import type_utils
        from torch.onnx._internal.fx.passes import type_promotion

        rule_of, table = type_promotion.get_type_promotion_rule, type_promotion.TypePromotionTable()
        type_of = type_utils.from_scalar_type_to_torch_dtype
    except (ImportError, AttributeError):
        yield
        return

    def where_needed(inserting: Callable[[Any], None]) -> Callable[[Any], None]:
        def insert(module: Any) -> None:
            graphs = [one.graph for one in module.modules()]
            if any(needs_casts(one, lambda node: rule_of(node, table), type_of) for one in graphs):
                inserting(module)

        return insert

    with replacing(_fx_passes, _NAME, where_needed):
        yield


def needs_casts(graph: Any, rule_of: Callable[[Any], Any], type_of: Callable[[type], Any]) -> bool:
    """Say whether an operand of any operator would be cast.

    Args:
        graph: Of an exported program; each node knows the value that it was traced with.
        rule_of: Gives the rule of a node, as torch's exporter has it, or `None`.
        type_of: Gives the tensor type that stands for a type of numbers, or `None`.
    """
    for node in graph.nodes:
        rule = rule_of(node) if node.op == "call_function" else None
        if rule is None:
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
        wanted = rule.preview_type_promotion(args, kwargs)
        operands = [(args[place], dtype) for place, dtype in wanted.args_dtypes.items() if place < len(args)]
        operands += [(kwargs[name], dtype) for name, dtype in wanted.kwargs_dtypes.items() if name in kwargs]
        if any(_is_cast(value, dtype, type_of) for value, dtype in operands):
            return True
    return False


def _is_cast(value: Any, dtype: Any, type_of: Callable[[type], Any]) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_cast(one, dtype, type_of) for one in value)
    own = value.dtype if isinstance(value, torch.Tensor) else type_of(type(value))
    return own is not None and own != dtype
