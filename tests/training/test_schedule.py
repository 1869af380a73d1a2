"""Step sizes and decay."""

import pytest
import torch
import transformers
from torch import nn

from lmopt.testing.models import tiny_llama
from lmopt.training import TrainingConfig
from lmopt.training.schedule import learning_rate, make_optimizer


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_rates_are_those_of_transformers_after_the_warm_up(kind: str, warmup: int) -> None:
    config = TrainingConfig(learning_rate=0.5, lr_scheduler_type=kind, warmup_steps=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=100)
    rates = []
    for _ in range(100):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [learning_rate(config, step, 100) for step in range(100)]
    assert ours[warmup:] == pytest.approx(rates[warmup:])
    # transformers' first step does not move at all.
    assert all(0 < one < 0.5 for one in ours[:warmup])
    assert ours[:warmup] == sorted(ours[:warmup])


def test_a_ratio_is_a_share_of_all_steps() -> None:
    config = TrainingConfig(learning_rate=1.0, warmup_ratio=0.2, lr_scheduler_type="constant")
    assert [learning_rate(config, step, 10) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


def test_norms_and_biases_do_not_decay() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    optimizer = make_optimizer(module.parameters(), TrainingConfig(weight_decay=0.1))
    decay = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    for name, one in module.named_parameters():
        assert decay[id(one)] == (0.1 if name in {"0.weight", "2.weight"} else 0.0), name


def test_the_optimiser_has_the_configured_numbers() -> None:
    config = TrainingConfig(learning_rate=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    group = make_optimizer(tiny_llama().parameters(), config).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.95), 1e-6)
