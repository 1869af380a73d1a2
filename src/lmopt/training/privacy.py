"""Fine-tune with differential privacy (DP-SGD), so that no single text can be read back from the weights.

Abadi and others, "Deep learning with differential privacy", CCS 2016: the gradient of each text is clipped, noise is
added to their sum, and an accountant says what that amounts to. Clipping, noise and accounting are opacus's; a second
accountant, Google's dp-accounting, has to agree. Gradients of single texts come from reading one text at a time: as
slow as a batch size of 1, exact for every module, tied weights and recurrent layers included.
"""

import copy
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Final

from lmopt.errors import InputError, NotInstalledError, TokenizerError, TrainingError, UnsupportedOptionError
from lmopt.model import Model
from lmopt.registry import pip_line
from lmopt.spec import Requirement

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lmopt.backends.torch.language_model import Decoder

_AGREEMENT: Final = 0.02
"""Most difference of the two accountants: 1 % of epsilon is asked of them, and each has an error of its own."""
_NEEDS: Final = ("opacus", "dp_accounting")


@dataclass(frozen=True, slots=True)
class PrivateResult:
    """A model that was trained with differential privacy, and what is promised of it.

    Attributes:
        model: The trained model; the given one is unchanged.
        epsilon: The promise, by the accountant that says more: the output is at most `exp(epsilon)` times as
            likely (but for `delta`) with any one text of the training data as without it.
        opacus_epsilon: By opacus (privacy random variables).
        accounting_epsilon: By dp-accounting (privacy loss distributions).
        delta: As asked for.
        noise_multiplier: Standard deviation of the noise, in units of `max_grad_norm`.
        sample_rate: Chance of each text to be in a step.
        steps: Steps that were made.
        losses: Mean loss of the texts of each step, in nats a token; 0 for an empty step. Not private itself.
    """

    model: Model
    epsilon: float
    opacus_epsilon: float
    accounting_epsilon: float
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    losses: tuple[float, ...]


def train_private(
    model: Model,
    texts: Sequence[str | Sequence[int]],
    *,
    target_epsilon: float,
    delta: float,
    max_grad_norm: float = 1.0,
    epochs: float = 3.0,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    block_size: int | None = None,
    trainable: Sequence[str] = ("*",),
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> PrivateResult:
    """Fine-tune a model by DP-SGD (with Adam's steps) on texts.

    What is protected is one element of `texts`: put all of one person into one element, and remove
    duplicates, since a text that is there k times has k times the epsilon.

    There is no seed: noise that can be predicted protects nobody.

    Args:
        model: Any model; its weights are trained in float32.
        texts: Texts, or rows of token ids. Longer ones are cut, not split.
        target_epsilon: Most privacy loss, by either accountant, 0.01 .. 100; 8 is weak, 1 is strong.
        delta: Chance to exceed it, below `1 / len(texts)`.
        max_grad_norm: Gradients of one text are scaled down to this 2-norm.
        epochs: Times that each text is read on average.
        batch_size: Texts in a step on average; more of them hide the noise better.
        learning_rate: Of Adam.
        block_size: Most tokens of a text; `None` takes 512, or the model's context if that is less.
        trainable: Patterns of the weights to train, by their paths; the others stay as they are.
        device: `"cpu"` or `"cuda"`.
        progress: Called with the stage's name, the steps done and their total.

    Raises:
        UnsupportedOptionError: A number makes no sense, or no weight fits `trainable`.
        InputError: There is nothing to train on.
        TokenizerError: Texts are given, but the model has no tokenizer.
        NotInstalledError: opacus or dp-accounting is missing.
        TrainingError: The accountants disagree, or a weight did not move.
    """
    _check(target_epsilon, delta, max_grad_norm, epochs, batch_size, learning_rate, len(texts))
    import torch
    from opacus.accountants.utils import get_noise_multiplier
    from opacus.optimizers import DPOptimizer

    from lmopt.backends.torch.language_model import as_decoder

    rows = _rows(model, texts, block_size)
    module = copy.deepcopy(model.module).float().to(device)
    weights = _choose(module, trainable)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    rate = min(1.0, batch_size / len(rows))
    steps = max(1, math.ceil(epochs / rate))
    noise = get_noise_multiplier(
        target_epsilon=target_epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant="prv"
    )
    spent = epsilons(noise, rate, steps, delta)
    while max(spent) > target_epsilon:  # opacus is satisfied, but dp-accounting says a little more
        noise *= 1.005
        spent = epsilons(noise, rate, steps, delta)
    generator = torch.Generator(device).manual_seed(secrets.randbits(63))
    optimizer = DPOptimizer(
        torch.optim.Adam(weights.values(), lr=learning_rate),
        noise_multiplier=noise,
        max_grad_norm=max_grad_norm,
        expected_batch_size=max(1, round(rate * len(rows))),
        generator=generator,
    )
    # Texts are drawn one by one (Poisson), as the accountants assume; fixed batches would void the figure.
    chance = secrets.SystemRandom()
    losses = []
    decoder = as_decoder(module)
    module.train()
    for step in range(steps):
        chosen = [row for row in rows if chance.random() < rate]
        losses.append(_step(decoder, optimizer, list(weights.values()), chosen, device))
        if progress is not None:
            progress("train privately", step + 1, steps)
    if still := [name for name, weight in weights.items() if torch.equal(weight.detach(), before[name])]:
        raise TrainingError(
            f"{still[0]} did not change in {steps} steps, so nothing was learned there: please report this"
        )
    module.eval().requires_grad_(False)
    return PrivateResult(
        model.with_module(module.to(next(model.module.parameters()).device)),
        epsilon=max(spent),
        opacus_epsilon=spent[0],
        accounting_epsilon=spent[1],
        delta=delta,
        noise_multiplier=noise,
        sample_rate=rate,
        steps=steps,
        losses=tuple(losses),
    )


def epsilons(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> tuple[float, float]:
    """Account for a training, twice.

    Args:
        noise_multiplier: Standard deviation of the noise, in units of the clipping norm.
        sample_rate: Chance of each text to be in a step.
        steps: Steps.
        delta: Chance to exceed epsilon.

    Returns:
        Epsilon by opacus and by dp-accounting.

    Raises:
        TrainingError: They disagree.
    """
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant
    from opacus.accountants import PRVAccountant

    first = PRVAccountant()
    first.history = [(noise_multiplier, sample_rate, steps)]
    opacus = float(first.get_epsilon(delta=delta))
    one = dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(noise_multiplier))
    second = PLDAccountant().compose(dp_event.SelfComposedDpEvent(one, steps))
    google = float(second.get_epsilon(delta))
    if abs(opacus - google) > _AGREEMENT * max(1.0, google):
        raise TrainingError(
            f"the accountants disagree: epsilon is {opacus:.4f} by opacus and {google:.4f} by dp-accounting, so "
            "neither is to be trusted. Please report this with the versions of both."
        )
    return opacus, google


def _step(
    decoder: "Decoder", optimizer: Any, weights: "list[Tensor]", chosen: list[list[int]], device: str
) -> float:
    """Make one step; gradients are clipped and summed text by text, so memory does not grow with their number."""
    import torch

    from lmopt.training.objective import next_token_loss

    total = 0.0
    # An empty step adds noise alone, as it must: that nobody was chosen is a secret, too.
    for place, row in enumerate(chosen or [None]):
        for weight in weights:
            weight.grad = None
            weight.grad_sample = None  # type: ignore[attr-defined]
        if row is None:
            for weight in weights:
                weight.grad_sample = weight.new_zeros((0, *weight.shape))  # type: ignore[attr-defined]
        else:
            ids = torch.tensor([row], device=device)
            loss = next_token_loss(decoder.start(ids)[0][:, :-1], ids[:, 1:])
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            for weight in weights:
                given = weight.grad if weight.grad is not None else torch.zeros_like(weight)
                weight.grad_sample = given[None]  # type: ignore[attr-defined]
        optimizer.signal_skip_step(do_skip=place + 1 < len(chosen))
        optimizer.step()
        if place + 1 < len(chosen):
            optimizer.zero_grad()
    optimizer.zero_grad()
    return total / len(chosen) if chosen else 0.0


def _rows(model: Model, texts: Sequence[str | Sequence[int]], block_size: int | None) -> list[list[int]]:
    most = block_size or min(512, model.facts.context_length or 512)
    rows = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if model.tokenizer is None:
                raise TokenizerError(
                    "texts are given, but the model has no tokenizer: give rows of token ids"
                )
            text = model.tokenizer.encode(text)
        if len(text) < 2:
            raise InputError(
                f"text {number} has {len(text)} tokens; 2 are needed to learn from. Leave it out."
            )
        rows.append([int(one) for one in text[:most]])
    return rows


def _choose(module: "nn.Module", patterns: Sequence[str]) -> "dict[str, Tensor]":
    module.requires_grad_(False)
    found = {
        name: weight
        for name, weight in module.named_parameters()
        if any(fnmatch(name, pattern) for pattern in patterns)
    }
    if not found:
        raise UnsupportedOptionError(
            f"no weight fits trainable={list(patterns)}; paths are as in named_parameters()"
        )
    for weight in found.values():
        weight.requires_grad_(True)
    return dict(found)


def _check(
    epsilon: float,
    delta: float,
    norm: float,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    texts: int,
) -> None:
    if missing := [name for name in _NEEDS if not Requirement(name, "").is_met()]:
        extra = pip_line('"lmopt[privacy]"')
        raise NotInstalledError(
            f"private training needs {' and '.join(missing)}, which this Python lacks: {extra}"
        )
    if texts < 1:
        raise InputError("there are no texts to train on")
    numbers = {
        "target_epsilon": epsilon,
        "max_grad_norm": norm,
        "epochs": epochs,
        "learning_rate": learning_rate,
    }
    for name, value in {**numbers, "batch_size": batch_size}.items():
        if not (value > 0 and math.isfinite(value)):
            raise UnsupportedOptionError(f"{name}={value!r} is not possible; expected a number above 0")
    if not 0.01 <= epsilon <= 100:  # beyond, the accountants need hours, and it means nothing
        raise UnsupportedOptionError(f"target_epsilon={epsilon!r} is not possible; expected 0.01 .. 100")
    if not 0 < delta < 1 / texts:
        raise UnsupportedOptionError(
            f"delta={delta!r} with {texts} texts: it must be above 0 and below 1 / {texts}, or publishing one text at "
            "random would count as private"
        )
