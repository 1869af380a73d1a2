"""Parts are told by what they compute: a name proves nothing, and a small difference is seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lmopt.backends.torch.fused.evidence import find_activation, find_linear, find_norm
from lmopt.backends.torch.fused.plan import Linear
from lmopt.backends.torch.fused.reason import InexpressibleError
from lmopt.backends.torch.fused.recording import window_of
from lmopt.backends.torch.fused.sources import Seen, find_source


class Scaled(nn.Module):
    """Root mean square, with what the tests vary."""

    def __init__(self, formula: Callable[[Tensor, Tensor], Tensor], eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))
        self.eps = eps
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps), self.weight)


def test_gains_of_both_conventions_are_read() -> None:
    plain = Scaled(lambda x, weight: x * weight)
    norm = find_norm(plain)
    assert norm is not None
    assert (norm.kind, norm.epsilon) == ("rms", 1e-6)
    assert torch.equal(norm.gain, plain.weight)
    shifted = Scaled(lambda x, weight: x * (1 + weight))
    norm = find_norm(shifted)
    assert norm is not None
    torch.testing.assert_close(norm.gain, 1 + shifted.weight.detach())


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, weight: x * weight * 1.001,
        lambda x, weight: x * weight.abs(),
        lambda x, weight: torch.tanh(x * weight),
    ],
)
def test_what_only_looks_like_a_norm_is_none(formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert find_norm(Scaled(formula)) is None


def test_an_epsilon_that_is_not_the_one_it_names_is_noticed() -> None:
    part = Scaled(lambda x, weight: x * weight)
    lying = part.forward
    part.eps = 1e-6
    part.forward = lambda x: (
        lying(x)
        if False
        else part.weight
        * x
        * torch.rsqrt(  # type: ignore[method-assign]
            x.square().mean(-1, keepdim=True) + 1e-5
        )
    )
    assert find_norm(part) is None


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norms_are_told_from_root_mean_square(bias: bool) -> None:
    part = nn.LayerNorm(16, bias=bias)
    nn.init.normal_(part.weight)
    norm = find_norm(part)
    assert norm is not None
    assert norm.kind == "layer"
    assert (norm.bias is not None) == bias


def test_linears_are_known_by_their_product() -> None:
    from transformers.pytorch_utils import Conv1D

    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert find_linear(nn.Linear(8, 12)) == Linear()
    assert find_linear(Conv1D(12, 8)) == Linear(stored_transposed=True)
    square = Conv1D(8, 8)
    assert find_linear(square) == Linear(stored_transposed=True)
    assert find_linear(Doubling(8, 12)) is None
    assert find_linear(nn.Bilinear(4, 4, 4)) is None


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), None),
        (nn.Dropout(0.0), None),
        (nn.Mish(), None),
    ],
)
def test_activations_are_told_apart(part: nn.Module, kind: str | None) -> None:
    assert find_activation(part.eval(), torch.zeros(2, 7, 48)) == kind


# Masks ------------------------------------------------------------------------------------------


def causal(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def sliding(window: int) -> Callable[..., Tensor]:
    return lambda row, head, query, key: (key <= query) & (key > query - window)


def test_windows_are_measured() -> None:
    assert window_of(causal) is None
    for window in (1, 8, 4096, 131072):
        assert window_of(sliding(window)) == window


@pytest.mark.parametrize(
    "rule",
    [
        lambda row, head, query, key: (key <= query) & (key // 64 == query // 64),
        lambda row, head, query, key: (key <= query) & (key // 8192 == query // 8192),
        lambda row, head, query, key: (key <= query) | (key < 4),
        lambda row, head, query, key: (key <= query) & (key % 2 == query % 2),
        lambda row, head, query, key: torch.ones_like(key <= query),
    ],
    ids=["chunks of 64", "chunks of 8192", "prefix", "every other", "both ways"],
)
def test_masks_that_are_no_window_are_refused(rule: Callable[..., Tensor]) -> None:
    with pytest.raises(InexpressibleError):
        window_of(rule)


# Sources ----------------------------------------------------------------------------------------


def test_heads_are_followed_to_the_columns_of_their_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    linear = nn.Linear(8, 3 * 12)
    with torch.no_grad():
        result = linear(x)
    # As GPT-NeoX lays them: for each of 3 heads its query, key and value.
    heads = result.view(2, 5, 3, 12).transpose(1, 2)
    key = heads[..., 4:8]
    source = find_source(key, [Seen("qkv", x, result)], {"qkv": Linear()}, {})
    assert source is not None
    assert source.columns.index.tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]
    assert find_source(key * 2, [Seen("qkv", x, result)], {"qkv": Linear()}, {}) is None
    assert find_source(functional.silu(key), [Seen("qkv", x, result)], {"qkv": Linear()}, {}) is None


def test_equal_columns_keep_their_order() -> None:
    x = torch.randn(2, 5, 8)
    result = torch.zeros(2, 5, 12)
    heads = result[..., 4:8].unflatten(-1, (2, 2)).transpose(1, 2)
    source = find_source(heads, [Seen("qkv", x, result)], {"qkv": Linear()}, {})
    assert source is not None
    assert source.columns.index.tolist() == sorted(source.columns.index.tolist())
