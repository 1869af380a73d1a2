"""Divergences against formulas written out, and their gradients against finite differences."""

import pytest
import torch
from torch.nn import functional

from lmopt.training import divergences
from lmopt.training.divergences import divergence, top_k_divergence

SHAPE = (6, 23)


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, beta: float
) -> torch.Tensor:
    """The definition, by torch's own KL."""
    log_q, log_p = (one.div(temperature).log_softmax(-1) for one in (student, teacher))

    def kl(log_of: torch.Tensor, log_to: torch.Tensor) -> torch.Tensor:
        return functional.kl_div(log_to, log_of, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_value_and_gradient_are_those_of_the_definition(beta: float, temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    weights = torch.arange(1.0, 7, dtype=torch.float64)
    ours = divergence(student, teacher, temperature=temperature, beta=beta)
    torch.testing.assert_close(ours, written_out(student, teacher, temperature, beta))
    (found,) = torch.autograd.grad((ours * weights).sum(), student)
    (expected,) = torch.autograd.grad(
        (written_out(student, teacher, temperature, beta) * weights).sum(), student
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradients_pass_finite_differences(beta: float) -> None:
    teacher = logits(1)
    assert torch.autograd.gradcheck(
        lambda one: divergence(one, teacher, temperature=2.0, beta=beta), logits(0).requires_grad_()
    )


def test_a_student_like_its_teacher_is_at_distance_zero() -> None:
    one = logits(3)
    for beta in (0.0, 0.5, 1.0):
        assert divergence(one, one + 7.0, beta=beta).abs().max() < 1e-12


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    whole = divergence(student, teacher)
    (slope,) = torch.autograd.grad(whole.sum(), student)
    monkeypatch.setattr(divergences, "_CHUNK", 2 * SHAPE[1])
    pieces = divergence(student, teacher)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces.sum(), student)[0], slope)


def test_bfloat16_logits_are_judged_in_float32() -> None:
    student, teacher = logits(0).to(torch.bfloat16).requires_grad_(), logits(1).float()
    value = divergence(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, divergence(student.detach().float(), teacher))
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.bfloat16


def best(
    teacher: torch.Tensor, k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_p = teacher.div(temperature).log_softmax(-1)
    kept, ids = log_p.topk(k, -1)
    return (
        ids,
        kept,
        torch.log1p(-kept.exp().sum(-1)) if k < SHAPE[1] else torch.full((SHAPE[0],), -torch.inf),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_answers_give_the_whole_divergence(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    ids, kept, rest = best(teacher, SHAPE[1], temperature)
    found = top_k_divergence(student, ids, kept, log_tail=rest.double(), temperature=temperature)
    torch.testing.assert_close(found, divergence(student, teacher, temperature=temperature))


@pytest.mark.parametrize("k", [1, 4, 22])
def test_the_rest_is_one_event(k: int) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    ids, kept, rest = best(teacher, k, 2.0)
    found = top_k_divergence(student, ids, kept, log_tail=rest, temperature=2.0)
    q = student.div(2.0).softmax(-1)
    q_kept = q.gather(-1, ids)
    tail = 1 - q_kept.sum(-1)
    expected = (kept.exp() * (kept - q_kept.log())).sum(-1) + rest.exp() * (rest - tail.log())
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(one.sum(), student)[0] for one in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])
    # Data processing inequality: lumping never overstates.
    assert (found <= divergence(student, teacher, temperature=2.0) + 1e-12).all()


def test_gradients_of_the_likeliest_answers_pass_finite_differences() -> None:
    ids, kept, rest = best(logits(1), 5, 1.5)
    assert torch.autograd.gradcheck(
        lambda one: top_k_divergence(one, ids, kept, log_tail=rest, temperature=1.5),
        logits(0).requires_grad_(),
    )


def test_a_teacher_without_doubt_leaves_no_rest() -> None:
    student = logits(0).requires_grad_()
    ids = torch.zeros(SHAPE[0], 1, dtype=torch.int64)
    sure = torch.zeros(SHAPE[0], 1, dtype=torch.float64)
    value = top_k_divergence(student, ids, sure, log_tail=torch.full((SHAPE[0],), -torch.inf))
    torch.testing.assert_close(value, -student.detach().log_softmax(-1)[:, 0])
    (slope,) = torch.autograd.grad(value.sum(), student)
    assert bool(slope.isfinite().all())
