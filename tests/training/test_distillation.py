"""The losses of distillation: what they add up, which positions count, whom they train."""

from typing import Any

import numpy as np
import pytest
import torch

from lmopt.errors import UnsupportedOptionError
from lmopt.testing.models import VOCAB_SIZE, tiny_gpt, tiny_llama, tiny_lstm
from lmopt.training.distillation import Distillation
from lmopt.training.hidden_states import HiddenStates
from lmopt.training.learner import Learner
from lmopt.training.objective import IGNORE, Batch, Loss, Outputs, next_token_loss
from lmopt.training.teachers import LiveTeacher


def batch(rows: int = 3, length: int = 8, ignored: int = 2) -> Batch:
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (rows, length + 1))
    labels = ids[:, 1:].copy()
    labels[-1, length - ignored :] = IGNORE
    return Batch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(labels), np.arange(rows), 0)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt, tiny_lstm])
def test_the_loss_is_its_parts(make: Any) -> None:
    teacher, student, read = make(0), make(1), batch()
    loss = Distillation(LiveTeacher(teacher), temperature=2.0, alpha=0.7)
    assert isinstance(loss, Loss)
    value, parts, _ = Learner(student, loss)(read)
    found = [one(read.input_ids) for one in (teacher, student)]
    logits = [getattr(one, "logits", one[0] if isinstance(one, tuple) else one) for one in found]
    learnt = read.labels != IGNORE
    p, q = (one[learnt].div(2.0).log_softmax(-1) for one in logits)
    apart = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(parts["distillation"], apart)
    nll = next_token_loss(logits[1], read.labels)
    torch.testing.assert_close(parts["next_token"], nll)
    torch.testing.assert_close(value, 0.7 * 4 * apart + 0.3 * nll)


def test_positions_that_are_not_learnt_do_not_count() -> None:
    teacher, read = LiveTeacher(tiny_llama(0)), batch()
    loss = Distillation(teacher, alpha=0.5)
    logits = tiny_llama(1)(read.input_ids).logits
    changed = logits.clone()
    changed[-1, -2:] += torch.randn(2, VOCAB_SIZE)
    assert torch.equal(loss(read, Outputs(logits)).loss, loss(read, Outputs(changed)).loss)
    changed[-1, -3] += torch.randn(VOCAB_SIZE)
    assert not torch.equal(loss(read, Outputs(logits)).loss, loss(read, Outputs(changed)).loss)


def test_the_teacher_is_neither_trained_nor_kept_with_the_student() -> None:
    teacher, student = tiny_llama(0), tiny_llama(1).requires_grad_(True)
    with HiddenStates(student, LiveTeacher(teacher)) as hidden:
        learner = Learner(student, Distillation(LiveTeacher(teacher), hidden=hidden))
        assert {id(one) for one in learner.parameters()} == {id(one) for one in student.parameters()}
        learner(batch())[0].backward()
    assert all(one.grad is None for one in teacher.parameters())
    assert all(one.grad is not None for one in student.parameters())


def test_a_teacher_with_padded_logits_is_compared_on_the_common_ids() -> None:
    teacher, student, read = tiny_llama(0), tiny_llama(1), batch()

    class Padded(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.cat([teacher(ids).logits, torch.full((*ids.shape, 5), 50.0)], -1)

    logits = student(read.input_ids).logits
    values = [Distillation(LiveTeacher(one))(read, Outputs(logits)).loss for one in (teacher, Padded())]
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize(
    ("given", "named"),
    [({"temperature": 0.0}, "temperature"), ({"alpha": 1.5}, "alpha"), ({"beta": -0.1}, "beta"),
     ({"hidden_weight": -1.0}, "hidden_weight")],
)  # fmt: skip
def test_impossible_weights_are_refused(given: dict[str, float], named: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=named):
        Distillation(LiveTeacher(tiny_llama()), **given)


def test_it_says_by_plain_data_what_it_is() -> None:
    import json

    student = tiny_llama(1)
    teacher = LiveTeacher(tiny_llama(0), "abc")
    with HiddenStates(student, teacher, pairs=[(0, 1)]) as hidden:
        said = Distillation(teacher, hidden=hidden, hidden_weight=0.5).describe()
    assert json.loads(json.dumps(said)) == said
    assert said["teacher"] == "abc"
    assert said["hidden_states"] == {"weight": 0.5, "pairs": [[0, 1]], "projection": False}
