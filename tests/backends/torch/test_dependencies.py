"""What belongs together in a model is found by what depends on what."""

import numpy as np
import pytest
import torch
from structured_models import VOCAB_SIZE, Stacked, family
from torch import Tensor, nn

from lmopt.backends.torch.dependencies import find_channels, find_heads
from lmopt.backends.torch.dependency_probe import Probe
from lmopt.errors import UnsupportedError, UnsupportedOptionError


@pytest.mark.parametrize(
    ("name", "consumer", "rows", "count"),
    [
        ("llama", "model.layers.{}.mlp.down_proj", {"gate_proj": 1, "up_proj": 1}, 64),
        ("gemma2", "model.layers.{}.mlp.down_proj", {"gate_proj": 1, "up_proj": 1}, 64),
        ("phi3", "model.layers.{}.mlp.down_proj", {"gate_up_proj": 2}, 64),
        ("gpt2", "transformer.h.{}.mlp.c_proj", {"c_fc": 1}, 128),
    ],
)
def test_channels_are_found(name: str, consumer: str, rows: dict[str, int], count: int) -> None:
    found = find_channels(family(name), VOCAB_SIZE)
    assert [one.consumer for one in found] == [consumer.format(place) for place in range(4)]
    for one in found:
        assert one.count == count
        assert one.columns.tolist() == list(range(count))
        parent = one.consumer.rpartition(".")[0]
        # A packed gate and up lie behind each other.
        expected = {f"{parent}.{path}": [*range(count)] * times for path, times in rows.items()}
        assert {path: owners.tolist() for path, owners in one.rows.items()} == expected


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "mixtral", "gpt-oss"])
def test_heads_are_found_with_their_key_and_value(name: str) -> None:
    found = find_heads(family(name), VOCAB_SIZE)
    assert len(found) == 4
    for place, one in enumerate(found):
        attention = f"model.layers.{place}.self_attn"
        assert (one.consumer, one.count) == (f"{attention}.o_proj", 2)
        assert one.columns.tolist() == [0] * 16 + [1] * 16
        assert {path: owners.tolist() for path, owners in one.rows.items()} == {
            f"{attention}.q_proj": [0] * 16 + [1] * 16,
            f"{attention}.k_proj": [0] * 8 + [1] * 8,
            f"{attention}.v_proj": [0] * 8 + [1] * 8,
        }


def test_packed_heads_are_found() -> None:
    (first, *_) = find_heads(family("phi3"), VOCAB_SIZE)
    both = [0] * 8 + [1] * 8
    assert first.rows["model.layers.0.self_attn.qkv_proj"].tolist() == [0] * 16 + [1] * 16 + both + both
    (first, *_) = find_heads(family("tiny-gpt"), VOCAB_SIZE)
    heads = np.repeat(np.arange(4), 8).tolist()
    assert first.rows["blocks.0.qkv"].tolist() == heads * 3


class Shuffled(nn.Module):
    """Channels that no position gives away: gate rows lie between up rows, and all are permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCAB_SIZE, 8), nn.Linear(8, VOCAB_SIZE)
        self.both, self.down = nn.Linear(8, 600), nn.Linear(300, 8)
        self.register_buffer("order", torch.randperm(300, generator=torch.Generator().manual_seed(1)))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        both = self.both(hidden)
        mixed = (both[..., ::2].relu() * both[..., 1::2])[..., self.order]
        result: Tensor = self.head(torch.layer_norm(hidden + self.down(mixed), (8,)))
        return result


def test_any_order_of_rows_is_found() -> None:
    module = Shuffled()
    (found,) = find_channels(module, VOCAB_SIZE)
    owners = found.rows["both"]
    order: Tensor = module.order
    for column, source in enumerate(order.tolist()):
        assert np.flatnonzero(owners == column).tolist() == [2 * source, 2 * source + 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_type_will_do(dtype: torch.dtype) -> None:
    plain, other = (find_channels(family("phi3").to(one), VOCAB_SIZE) for one in (torch.float32, dtype))
    assert [one.rows.keys() for one in plain] == [one.rows.keys() for one in other]
    for one, two in zip(plain, other, strict=True):
        assert all(np.array_equal(one.rows[path], two.rows[path]) for path in one.rows)


@pytest.mark.parametrize(
    ("find", "name", "told"),
    [
        (find_heads, "olmo2", r"model\.layers\.0\.self_attn \(Olmo2Attention\).*a norm over all of it"),
        (find_channels, "mixtral", r"model\.layers\.0\.mlp\.experts \(MixtralExperts\)"),
        (find_channels, "gpt-oss", r"model\.layers\.0\.mlp\.experts \(GptOssExperts\)"),
        (find_channels, "tiny-lstm", r"lstm \(LSTM\).*a recurrence"),
        (find_heads, "tiny-lstm", r"lstm \(LSTM\)"),
    ],
)
def test_what_cannot_be_cut_is_named(find: object, name: str, told: str) -> None:
    with pytest.raises(UnsupportedError, match=told):
        find(family(name), VOCAB_SIZE)  # type: ignore[operator]


def test_one_key_value_head_is_one_piece() -> None:
    with pytest.raises(UnsupportedError, match="one key-value head for all"):
        find_heads(family("llama", num_key_value_heads=1), VOCAB_SIZE)


class NormedInside(Stacked):
    """A norm over the channels, so that each reaches all."""

    def __init__(self) -> None:
        super().__init__()
        for part in self.parts:
            part.down = nn.Sequential(nn.LayerNorm(32), part.down)


class Leaking(Stacked):
    """Channels that leak a little into their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        for part in self.parts:
            part.down = nn.Sequential(Leak(), part.down)


class Leak(nn.Module):
    """Adds a share of the neighbour."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.03 * x.roll(1, -1)


class ReadTwice(Stacked):
    """Channels that something else reads as well."""

    def forward(self, input_ids: Tensor) -> Tensor:
        extra = self.parts[0].up(self.parts[0].norm(self.table(input_ids)))[..., :16]
        for part in self.parts[1:]:
            extra = part(extra)
        logits: Tensor = self.head(extra + self.parts[0].down(extra.repeat(1, 1, 2)))
        return logits


def test_mixed_or_shared_channels_are_no_channels() -> None:
    with pytest.raises(UnsupportedError, match=r"parts\.0\.down .*norm"):
        find_channels(NormedInside(), VOCAB_SIZE)
    with pytest.raises(UnsupportedError, match=r"parts\.0\.down "):
        find_channels(Leaking(), VOCAB_SIZE)
    with pytest.raises(UnsupportedError, match=r"parts\.0"):
        find_channels(ReadTwice(), VOCAB_SIZE)


def test_blocks_that_are_run_twice_are_refused() -> None:
    module = Stacked()
    module.parts[1] = module.parts[0]
    with pytest.raises(UnsupportedError, match="more than once"):
        find_channels(module, VOCAB_SIZE)


def test_tied_weights_are_not_cut() -> None:
    module = Stacked()
    module.parts[1].up.weight = module.parts[0].up.weight
    with pytest.raises(UnsupportedError, match=r"parts\.0"):
        find_channels(module, VOCAB_SIZE)


def test_quantized_models_are_refused() -> None:
    from lmopt.backends.torch.compressing import by_matrix
    from lmopt.compression import Quantize
    from lmopt.compression.step import Setting

    small = by_matrix(family("llama"), Quantize(8), Setting(VOCAB_SIZE))
    with pytest.raises(UnsupportedOptionError, match="prune first"):
        find_channels(small, VOCAB_SIZE)


def test_the_model_is_left_as_it_is() -> None:
    module = family("llama").train()
    parts = {path: dict(vars(part)) for path, part in module.named_modules()}
    find_heads(module, VOCAB_SIZE)
    assert {path: dict(vars(part)) for path, part in module.named_modules()} == parts
    assert all(one.grad is None for one in module.parameters())


def test_noise_of_one_linear_reaches_only_its_readers() -> None:
    probe = Probe(family("llama"), VOCAB_SIZE)
    closed = probe.closed()
    assert set(closed["model.layers.2.mlp.down_proj"].values()) == {False}
    attention = "model.layers.2.self_attn"
    assert closed[f"{attention}.o_proj"] == {
        f"{attention}.q_proj": False, f"{attention}.k_proj": True, f"{attention}.v_proj": True,
    }  # fmt: skip
    # Projections read the residual stream, which many feed.
    assert not any(path.endswith(("q_proj", "up_proj", "lm_head")) for path in closed)
