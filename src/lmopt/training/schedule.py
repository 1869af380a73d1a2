"""The optimiser and its step size."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from lmopt.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Step size of a step: a pure function, so that resuming needs no state.

    Args:
        config: Shape of the schedule.
        step: Optimiser step, from 0.
        total: Steps of the whole run.

    Returns:
        The rate: it rises over the warm-up, whose first step already moves, then follows the schedule, as
        transformers' schedules do with one step added in front of the warm-up.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return config.learning_rate * max(0.0, factor[config.lr_scheduler_type])


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """Make AdamW, without decay of what has fewer than two axes: biases and the gains of norms.

    Args:
        parameters: What is trained.
        config: Its settings.

    References:
        Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """
    all_of_them = list(parameters)
    groups = [
        {
            "params": [one for one in all_of_them if (one.dim() >= 2) == decayed],
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
