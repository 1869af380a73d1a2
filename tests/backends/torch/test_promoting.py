"""Casts are looked for where there are some, and the others are not missed."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from translations import listen, run

from lmopt.backends.torch import graph, promoting

# What to compute of float32 `x`, int64 `n` and bool `b`, and whether any of it is cast.
CASES: dict[str, tuple[Any, bool]] = {
    "floats": (lambda x, n, b: x * 2.0 + x / 3.0 - x.relu(), False),
    "whole numbers": (lambda x, n, b: (n * 2 + n > 3) & (n == n), False),
    "a lookup": (lambda x, n, b: nn.functional.embedding(n % 3, x) + x.softmax(-1)[:, None, :1], False),
    "a choice": (lambda x, n, b: torch.where(b, x, -x).masked_fill(b, 0.5), False),
    "parts": (lambda x, n, b: torch.cat([x, -x], -1), False),
    "a cast of the author's": (lambda x, n, b: x * n.to(x.dtype), False),
    "a whole number beside fractions": (lambda x, n, b: x * 2, True),
    "both kinds": (lambda x, n, b: x * n, True),
    "a fraction of whole numbers": (lambda x, n, b: n / 2, True),
    "whole numbers and a fraction": (lambda x, n, b: n > 1.5, True),
    "truth and numbers": (lambda x, n, b: n + b, True),
    "a count of truths": (lambda x, n, b: b.sum(-1), True),
    "parts of both kinds": (lambda x, n, b: torch.cat([x, n], -1), True),
    "two precisions": (lambda x, n, b: x.half() + x, True),
    "an exponential of whole numbers": (lambda x, n, b: n.exp(), True),
}


class Function(nn.Module):
    """A module that computes a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, n: Tensor, b: Tensor) -> Any:
        # Each is read, so that each is an input of the graph.
        return self.function(x, n, b), x.abs(), n.abs(), b.logical_not()


@pytest.mark.parametrize("name", CASES)
def test_a_program_computes_what_it_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, cast = CASES[name]
    said = listen(monkeypatch, promoting, "needs_casts")
    torch.manual_seed(0)
    arguments = torch.randn(3, 3), torch.randint(0, 4, (3, 3)), torch.rand(3, 3) > 0.5
    module = Function(function)
    program = torch.export.export(module, arguments, strict=False)
    model = graph.as_operators(program, arguments, 20)
    assert any(said) == cast
    found = run(model, arguments)
    for result, expected in zip(found, module(*arguments), strict=True):
        assert result.dtype == expected.numpy().dtype
        np.testing.assert_allclose(result, expected.numpy(), rtol=1e-3)


def test_where_torch_has_moved_the_place_it_looks_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promoting, "_NAME", "somewhere_else")
    arguments = torch.randn(3, 3), torch.randint(0, 4, (3, 3)), torch.rand(3, 3) > 0.5
    program = torch.export.export(Function(CASES["both kinds"][0]), arguments, strict=False)
    kinds = [node.op_type for node in graph.as_operators(program, arguments, 20).graph]
    assert "Cast" in kinds
