"""Train a student to answer as its teacher does (knowledge distillation)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmopt.errors import UnsupportedOptionError
from lmopt.training.hidden_states import HiddenStates
from lmopt.training.objective import Batch, LossValue, Outputs, next_token_loss
from lmopt.training.teachers import Teacher


class Distillation(nn.Module):
    """`alpha T^2 D(teacher, student) + (1 - alpha) NLL + hidden_weight H`, means over learnt positions.

    `D` is the divergence of the next token's distributions at temperature `T` (see
    `lmopt.training.divergences.divergence`); `T^2` keeps its gradient's size as the temperature changes. `NLL` is the
    next token's negative log-likelihood, `H` the distance of hidden states.

    Args:
        teacher: The teacher, live or cached.
        temperature: `T`, more than 0. Above 1 the unlikely tokens count more.
        alpha: Share of the teacher against the text, 0 .. 1. With 0 only the hidden states are the teacher's.
        beta: 0 for forward KL, 1 for reverse KL, between them the generalised Jensen-Shannon divergence.
        hidden: Distance of hidden states, `None` for none.
        hidden_weight: Its weight.
        student: What identifies the student as it begins, such as `Model.fingerprint()`, so that a checkpoint is not
            taken up by another one; empty does not tell.

    Raises:
        UnsupportedOptionError: A number is out of its range.

    References:
        Hinton et al. 2015, arXiv:1503.02531; Agarwal et al. 2024, arXiv:2306.13649.
    """

    hidden_states = False
    """Blocks are watched by hooks, so that any module will do."""

    def __init__(
        self,
        teacher: Teacher,
        *,
        temperature: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.0,
        hidden: HiddenStates | None = None,
        hidden_weight: float = 1.0,
        student: str = "",
    ) -> None:
        super().__init__()
        check_weights(temperature=temperature, alpha=alpha, beta=beta, hidden_weight=hidden_weight)
        self.teacher = teacher
        self.temperature, self.alpha, self.beta = temperature, alpha, beta
        self.hidden, self.hidden_weight = hidden, hidden_weight
        self.student = student

    def forward(self, batch: Batch, outputs: Outputs) -> LossValue:
        """Judge a student's answers."""
        parts: dict[str, Tensor] = {}
        total: Tensor | None = None
        if self.alpha > 0:
            apart = self.teacher.divergence(
                batch, outputs.logits, temperature=self.temperature, beta=self.beta
            )
            parts["distillation"] = apart.mean()
            total = self.alpha * self.temperature**2 * parts["distillation"]
        if self.alpha < 1:
            parts["next_token"] = next_token_loss(outputs.logits, batch.labels)
            text = (1 - self.alpha) * parts["next_token"]
            total = text if total is None else total + text
        if self.hidden is not None:
            parts["hidden_states"] = self.hidden(batch)
            total = torch.add(self.hidden_weight * parts["hidden_states"], 0 if total is None else total)
        assert total is not None
        return LossValue(total, parts)

    def describe(self) -> Mapping[str, Any]:
        """Say by plain data what is minimised."""
        return {
            "loss": "distillation",
            "temperature": self.temperature,
            "alpha": self.alpha,
            "beta": self.beta,
            "hidden_states": None if self.hidden is None else self.hidden.describe(self.hidden_weight),
            "student": self.student,
            **self.teacher.describe(),
        }


def check_weights(*, temperature: float, alpha: float, beta: float, hidden_weight: float) -> None:
    """Refuse numbers out of their range.

    Raises:
        UnsupportedOptionError: Names the number and its range.
    """
    if not 0 < temperature < float("inf"):
        raise UnsupportedOptionError(
            f"temperature is {temperature!r}; expected a number above 0, such as 2.0"
        )
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise UnsupportedOptionError(f"{name} is {value!r}; expected 0 .. 1")
    if not 0 <= hidden_weight < float("inf"):
        raise UnsupportedOptionError(f"hidden_weight is {hidden_weight!r}; expected a number of at least 0")
