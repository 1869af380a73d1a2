"""Token ids that can be learnt, and the plain loop that training is held against."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from lmopt.testing.models import VOCAB_SIZE
from lmopt.training.config import TrainingConfig
from lmopt.training.schedule import learning_rate
from lmopt.training.sources import Source


@pytest.fixture(scope="session")
def ids() -> NDArray[np.int64]:
    """A walk with small steps: the next token is one of seven."""
    steps = np.random.default_rng(1).integers(0, 7, 3000)
    return np.asarray(steps.cumsum() % VOCAB_SIZE)


def plain_loop(
    module: nn.Module, source: Source, rows: int, config: TrainingConfig, *, carry: bool = False
) -> list[float]:
    """Train as one writes it by hand, with `torch.optim.AdamW`; return the losses."""
    module.train().requires_grad_(True)
    groups = [
        {
            "params": [one for one in module.parameters() if one.dim() > 1],
            "weight_decay": config.weight_decay,
        },
        {"params": [one for one in module.parameters() if one.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    losses, state = [], None
    assert config.max_steps is not None
    for step in range(config.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, config.max_steps)
        found = source.rows(step, 0, rows)
        if not carry or source.begins(step):
            state = None
        answer = module(torch.from_numpy(found.input_ids), *(() if state is None else (state,)))
        logits = answer.logits if hasattr(answer, "logits") else answer[0]
        if carry:
            state = tuple(one.detach() for one in answer[1])
        labels = torch.from_numpy(found.labels)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        if config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def by_hand() -> Callable[..., list[float]]:
    """The plain loop."""
    return plain_loop
