"""Programs are taken apart in place where that is plain, and compute what they did."""

import contextlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from translations import listen, run

from lmopt.backends.torch import decomposing, graph
from lmopt.testing.models import tiny_gpt, tiny_lstm


class Function(nn.Module):
    """A module that computes a function of two tensors."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(self, x, y)


def in_place_on_a_view(module: Any, x: Tensor, y: Tensor) -> Tensor:
    whole = x * 1
    whole[:, 0].add_(y[:, 0])
    return whole


def in_place_with_a_view_before(module: Any, x: Tensor, y: Tensor) -> Tensor:
    whole = x * 1
    part = whole.transpose(0, 1)
    whole.add_(y)
    return part @ whole


def in_place_that_is_not_read(module: Any, x: Tensor, y: Tensor) -> Tensor:
    whole = x * 1
    whole.mul_(y)
    whole.sub_(1)
    return whole + x


def in_place_on_an_argument(module: Any, x: Tensor, y: Tensor) -> Tensor:
    x.add_(1)
    return x + y


def in_place_of_another_type(module: Any, x: Tensor, y: Tensor) -> Tensor:
    half = x.to(torch.float16)
    half.add_(y * 1e-4)
    return half.float() * 3


def a_branch(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x, y: x + y, lambda x, y: x - y, (x, y))


PLAIN = {
    "casts": lambda module, x, y: (x.to(torch.float16).float() + y.to(torch.int64).to(y), x.to("cpu").long()),
    "a cast that is none is a result": lambda module, x, y: x.to(torch.float32),
    "dropout": lambda module, x, y: nn.functional.dropout(x, 0.5, training=False) + y,
    "dropout is a result": lambda module, x, y: nn.functional.dropout(x * y, 0.5, training=False),
    "reshapes": lambda module, x, y: x[None].expand(2, -1, -1).flatten(0, 1).reshape(-1) @ y.repeat(2, 1).view(-1),
    "a layout": lambda module, x, y: x.transpose(0, 1).contiguous() @ y,
    # A whole number beside fractions: the program is computed again, to find casts.
    "a view of a layout": lambda module, x, y: x.transpose(0, 1).contiguous().view(-1) * 2 + y.t().reshape(-1),
    "nothing flattened": lambda module, x, y: (x[:, :0, None] * y[:, None, :]).flatten(0, 1).flatten(),
    "an empty cache": lambda module, x, y: torch.cat(
        [x[:, :0, None, None].expand(-1, -1, 2, 3).flatten(2), y[:, :, None].expand(-1, -1, 6)], 1
    ),
    "a scalar flattened": lambda module, x, y: x.sum().flatten() + y,
    "sizes to be found": lambda module, x, y: x.reshape(-1, 2).transpose(0, 1).reshape(-1) * y.reshape(-1),
    "in place by a number": lambda module, x, y: (x * 1).mul_(2.5),
    "flatten at the end": lambda module, x, y: (x[:, :, None] * y[:, None]).flatten(1),
    "flatten in the middle": lambda module, x, y: (x[:, :, None, None] * y[:, None, :, None]).flatten(1, 2),
    "and, or, least, largest": lambda module, x, y: torch.min(x, y).where((x > 0) & (y > 0) | (x < -1), y.max(x)),
    "a copy of a constant": lambda module, x, y: x + torch.tensor([1.0, 2.0, 3.0, 4.0]) + module.table[0],
    "nobody reads it": lambda module, x, y: (x.sum(), y.to(torch.int64), x + y)[2],
    "in place": in_place_that_is_not_read,
}  # fmt: skip
OTHERS = {
    "in place by a size": lambda module, x, y: (x * 1).add_(y.shape[0]),
    "in place on a view": in_place_on_a_view,
    "in place beside a view": in_place_with_a_view_before,
    "in place on an argument": in_place_on_an_argument,
    "in place of another type": in_place_of_another_type,
    "a branch": a_branch,
}


def translated(
    module: nn.Module, arguments: Any, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Any, list[bool]]:
    """Translate a module; also say for each program whether it was taken apart in place."""
    said = listen(monkeypatch, decomposing, "rewritten")
    program = torch.export.export(module.eval(), arguments, strict=False, **options)
    return graph.as_operators(program, arguments, 20), said


@pytest.mark.parametrize(
    ("name", "plain"), [*((one, True) for one in PLAIN), *((one, False) for one in OTHERS)]
)
def test_a_program_computes_what_it_did(name: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Function((PLAIN if plain else OTHERS)[name])
    torch.manual_seed(0)
    arguments = torch.randn(3, 4), torch.randn(3, 4)
    rows = {0: Dim("rows", min=2, max=64)}
    model, said = translated(module, arguments, monkeypatch, dynamic_shapes={"x": rows, "y": rows})
    assert said == [plain]
    given = torch.randn(5, 4), torch.randn(5, 4)
    expected = module(*(one.clone() for one in given))
    results = run(model, given)
    # What changes its argument gives that back, too, before the result.
    wanted = expected if isinstance(expected, tuple) else (expected,)
    for found, one in zip(results[-len(wanted) :], wanted, strict=True):
        assert found.dtype == one.numpy().dtype
        np.testing.assert_allclose(found, one.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_gpt, tiny_lstm])
def test_a_second_trace_would_write_the_same(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = torch.tensor([[3, 5, 7]]), None
    kinds = []
    for manager in (decomposing.decomposed_in_place, contextlib.nullcontext):
        monkeypatch.setattr(graph, "decomposed_in_place", manager)
        model, said = translated(make(), arguments, monkeypatch)
        assert said == [True] * (manager is decomposing.decomposed_in_place)
        kinds.append(Counter(node.op_type for node in model.graph))
    # But for the constants of what nobody reads, and copies.
    ours, theirs = (
        {one: n for one, n in kind.items() if one not in ("Constant", "Identity")} for kind in kinds
    )
    assert ours == theirs


def test_where_torch_has_moved_the_place_it_traces_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposing, "_NAME", "somewhere_else")
    arguments = torch.randn(3, 4), torch.randn(3, 4)
    model, said = translated(Function(PLAIN["casts"]), arguments, monkeypatch)
    assert said == []
    assert len(run(model, arguments)) == 2
