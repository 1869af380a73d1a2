"""How far a student's distribution lies from its teacher's, with gradients that need no copies of the logits.

A vocabulary of 50,000 makes logits the largest tensors of a step. Written in plain operators, a divergence keeps
five more of their size for the backward pass; here the gradient is computed with the value, some positions at a time.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

# Values of logits that are worked on at once: 16 MiB of float32, which stays near the cores.
_CHUNK: Final = 1 << 22

# Logarithm in place of that of 0, so that 0 * log 0 is 0.
_TINY: Final = 1e-30

_Rows = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, beta: float = 0.0) -> Tensor:
    """Measure the generalised Jensen-Shannon divergence of each position.

    With `p` the teacher's and `q` the student's probabilities at the temperature and `m = beta p + (1 - beta) q`:
    `KL(p || q)` for `beta = 0` (forward: the student covers all that the teacher does), `KL(q || p)` for `beta = 1`
    (reverse: it keeps to what the teacher finds likely), and between them `beta KL(p || m) + (1 - beta) KL(q || m)`.

    Args:
        student: `(positions, vocab_size)` logits; receives the gradient.
        teacher: The same shape, without gradient.
        temperature: Both logits are divided by it, more than 0.
        beta: 0 .. 1.

    Returns:
        `(positions,)` in nats, float32 (float64 for float64 logits). Not scaled by the temperature.

    References:
        Hinton et al. 2015, arXiv:1503.02531 (temperature); Agarwal et al. 2024, On-Policy Distillation of Language
        Models, arXiv:2306.13649 (beta).
    """

    def rows(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_q = torch.log_softmax(logits / temperature, -1)
        log_p = torch.log_softmax(teacher[part].to(logits.dtype) / temperature, -1)
        if beta == 0:
            p = log_p.exp()
            value = (p * (log_p - log_q)).sum(-1)
            return value, log_q.exp_().sub_(p)
        q = log_q.exp()
        if beta == 1:
            slope = log_q - log_p
            value = (q * slope).sum(-1)
        else:
            p = log_p.exp()
            log_m = (beta * p + (1 - beta) * q).clamp_min_(_TINY).log_()
            slope = (1 - beta) * (log_q - log_m)
            value = beta * (p * (log_p - log_m)).sum(-1) + (q * slope).sum(-1)
        # The softmax takes the mean off the slope by each probability.
        return value, q * (slope - (q * slope).sum(-1, keepdim=True))

    value: Tensor = _ByChunks.apply(student, rows, temperature)  # type: ignore[no-untyped-call]
    return value


def top_k_divergence(
    student: Tensor, ids: Tensor, log_p: Tensor, *, log_tail: Tensor, temperature: float = 1.0
) -> Tensor:
    """Measure the forward KL over the teacher's likeliest tokens and ONE event for all others.

    Lumping the others together never overstates the divergence (data processing inequality), leaves the student free
    to spread the rest as it likes, and is exact where `k` is the whole vocabulary. Renormalising the `k` tokens
    instead would teach that nothing else may ever follow.

    Args:
        student: `(positions, vocab_size)` logits; receives the gradient.
        ids: `(positions, k)` int64, the teacher's likeliest tokens, each once.
        log_p: `(positions, k)` the teacher's log-probabilities of them at the temperature.
        log_tail: `(positions,)` the logarithm of the probability of all others, `-inf` for none.
        temperature: The student's logits are divided by it, more than 0.

    Returns:
        `(positions,)` in nats, as from `divergence`.
    """

    def rows(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        some, known = ids[part], log_p[part].to(logits.dtype)
        log_q = torch.log_softmax(logits / temperature, -1)
        likely = log_q.gather(-1, some)
        # By itself and not as 1 minus the others: nearly all of q may lie on them.
        q = log_q.exp()
        others = q.scatter(-1, some, 0.0).sum(-1)
        log_others = others.clamp_min(_TINY).log()
        tail = log_tail[part].to(logits.dtype)
        p, p_tail = known.exp(), tail.exp()
        rest = torch.where(p_tail > 0, p_tail * (tail - log_others), torch.zeros_like(tail))
        value = (p * (known - likely)).sum(-1) + rest
        # The student's share of the tail falls on its tokens in proportion to their probabilities.
        slope = q * (1 - p_tail / others.clamp_min(_TINY))[:, None]
        return value, slope.scatter(-1, some, likely.exp() - p)

    value: Tensor = _ByChunks.apply(student, rows, temperature)  # type: ignore[no-untyped-call]
    return value


class _ByChunks(torch.autograd.Function):
    """Compute a value a row and its gradient together; `rows` gives `d value / d (logits / temperature)`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: _Rows, temperature: float) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        values = logits.new_empty(len(logits), dtype=wide)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        step = max(1, _CHUNK // logits.shape[-1])
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            values[part], slope = rows(logits[part].detach().to(wide), part)
            if gradient is not None:
                gradient[part] = slope.div_(temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0][:, None].to(gradient.dtype), None, None
