"""DP-SGD: a canary that plain training remembers is hidden, two accountants agree, weights move."""

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import lmopt
from lmopt.compression import Magnitude, Quantize
from lmopt.compressor import LossWarning
from lmopt.errors import InputError, TokenizerError, TrainingError, UnsupportedOptionError
from lmopt.evaluation.exposure import Exposure, exposure
from lmopt.testing.models import tiny_llama, tiny_lstm

pytest.importorskip("opacus", reason='opacus is not installed: pip install "lmopt[privacy]"')
pytest.importorskip("dp_accounting", reason='dp-accounting is not installed: pip install "lmopt[privacy]"')

from lmopt.training import privacy
from lmopt.training.privacy import epsilons, train_private

CHANCE = random.Random(0)
PREFIX = [5, 6, 7]
SECRET = [13, 18, 11, 16]
OTHERS = [[CHANCE.randrange(20, 90) for _ in range(10)] for _ in range(112)]
TEXTS = [*OTHERS, *[PREFIX + SECRET] * 16]
CANDIDATES = [PREFIX + [CHANCE.randrange(10, 20) for _ in SECRET] for _ in range(1023)]
HOW: dict[str, Any] = {"delta": 1e-3, "epochs": 8, "batch_size": 32, "learning_rate": 5e-3}


def exposed(model: lmopt.Model) -> Exposure:
    with lmopt.Runtime(model, backend="torch", threads=1) as runtime:
        return exposure(runtime.engine, PREFIX + SECRET, CANDIDATES, space=10_000, batch_size=256)


def train_plainly(model: lmopt.Model) -> lmopt.Model:
    module = copy.deepcopy(model.module).requires_grad_(True).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=HOW["learning_rate"])
    for epoch in range(15):
        order = random.Random(epoch).sample(TEXTS, len(TEXTS))
        for start in range(0, len(order), 32):
            optimizer.zero_grad()
            for row in order[start : start + 32]:
                ids = torch.tensor([row])
                functional.cross_entropy(module(ids)[0][0, :-1], ids[0, 1:]).backward()
            optimizer.step()
    return model.with_module(module.eval().requires_grad_(False))


def test_a_canary_is_found_without_and_hidden_with_differential_privacy() -> None:
    torch.set_num_threads(1)
    model = lmopt.Model.from_module(tiny_lstm())
    before = [weight.clone() for weight in model.module.parameters()]
    plain = exposed(train_plainly(model))
    assert plain.bits >= 8, plain
    private = train_private(model, TEXTS, target_epsilon=1.0, **HOW)
    hidden = exposed(private.model)
    # Chance alone exceeds so many bits once in 16 times; the plain model has at least twice as many.
    assert hidden.bits <= 4, hidden
    assert private.epsilon <= 1.0, "asked for at most 1, by either accountant"
    assert private.accounting_epsilon == pytest.approx(private.opacus_epsilon, rel=0.02)
    assert private.steps == len(private.losses) == 32
    assert all(map(torch.equal, model.module.parameters(), before)), "the given model was trained"
    for weight, old in zip(private.model.module.parameters(), before, strict=True):
        assert not torch.equal(weight, old)


def test_compression_does_not_hide_a_canary() -> None:
    torch.set_num_threads(1)
    model = train_plainly(lmopt.Model.from_module(tiny_llama()))
    before = exposed(model)
    assert before.bits >= 8, before
    steps = (Quantize(bits=4, group_size=32, embedding=4, head=4), Magnitude(sparsity=0.5))
    for step in steps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LossWarning)  # the price of it: said, and not what is judged here
            small = lmopt.Compressor([step]).compress(model)
        assert exposed(small).bits >= 8, step


def test_transformers_models_and_chosen_weights() -> None:
    model = lmopt.Model.from_module(tiny_llama())
    old = {name: weight.clone() for name, weight in model.module.named_parameters()}
    found = train_private(
        model, OTHERS[:24], target_epsilon=8.0, delta=1e-2, epochs=1, batch_size=8, trainable=["*.mlp.*"]
    )
    for name, weight in found.model.module.named_parameters():
        assert torch.equal(weight, old[name]) == (".mlp." not in name), name
    assert found.steps == 3


def test_noise_grows_as_epsilon_falls() -> None:
    model = lmopt.Model.from_module(tiny_lstm())
    short: dict[str, Any] = {"delta": 1e-2, "epochs": 0.1, "batch_size": 8, "trainable": ["head.bias"]}
    weak, strong = (
        train_private(model, OTHERS[:64], target_epsilon=epsilon, **short) for epsilon in (8.0, 1.0)
    )
    assert weak.noise_multiplier < strong.noise_multiplier
    assert (weak.epsilon <= 8.0, strong.epsilon <= 1.0) == (True, True)


def test_epsilon_is_below_the_target_by_the_accountant_that_says_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = privacy.epsilons

    def skewed(*given: Any) -> tuple[float, float]:
        opacus, google = known(*given)
        return opacus, 1.015 * google

    monkeypatch.setattr(privacy, "epsilons", skewed)
    model = lmopt.Model.from_module(tiny_lstm())
    found = train_private(
        model, OTHERS[:64], target_epsilon=2.0, delta=1e-2, epochs=0.1, batch_size=8, trainable=["head.bias"]
    )
    assert found.opacus_epsilon < found.accounting_epsilon == found.epsilon
    assert 1.9 < found.epsilon <= 2.0


def test_texts_are_drawn_one_by_one_at_the_rate_that_is_accounted_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[int] = []
    step = privacy._step

    def counted(decoder: Any, optimizer: Any, weights: Any, chosen: list[list[int]], device: str) -> float:
        drawn.append(len(chosen))
        return step(decoder, optimizer, weights, chosen[:1], device)

    monkeypatch.setattr(privacy, "_step", counted)
    model = lmopt.Model.from_module(tiny_lstm())
    how: dict[str, Any] = {
        "target_epsilon": 8.0,
        "delta": 1e-3,
        "epochs": 40,
        "batch_size": 32,
        "trainable": ["head.bias"],
    }
    found = train_private(model, TEXTS, **how)
    assert (found.sample_rate, found.steps) == (32 / len(TEXTS), 160)
    # 160 x 128 draws at 1 in 4 are 5120 +- 62; equal batches would be no Poisson sampling.
    assert abs(sum(drawn) - 5120) < 400
    assert 3 < np.std(drawn) < 7


def test_each_text_counts_for_no_more_than_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, the sum of clipped gradients is what one computes by hand."""
    from opacus.optimizers import DPOptimizer

    from lmopt.backends.torch.language_model import as_decoder

    module = tiny_lstm().requires_grad_(True)
    weights = list(module.parameters())
    optimizer = DPOptimizer(
        torch.optim.SGD(weights, lr=0.0), noise_multiplier=0.0, max_grad_norm=0.05, expected_batch_size=1
    )
    sums = [torch.zeros_like(weight) for weight in weights]
    for row in OTHERS[:3]:
        ids = torch.tensor([row])
        loss = functional.cross_entropy(module(ids)[0][0, :-1], ids[0, 1:])
        found = torch.autograd.grad(loss, weights)
        norm = torch.sqrt(sum((one**2).sum() for one in found))
        for total, one in zip(sums, found, strict=True):
            total += one * min(1.0, 0.05 / float(norm))
    seen: list[torch.Tensor] = []
    step = optimizer.original_optimizer.step
    monkeypatch.setattr(
        optimizer.original_optimizer,
        "step",
        lambda *a: (seen.extend(w.grad.clone() for w in weights), step(*a)),
    )
    privacy._step(as_decoder(module), optimizer, weights, OTHERS[:3], "cpu")
    assert len(seen) == len(weights)
    for one, total in zip(seen, sums, strict=True):
        assert torch.allclose(one.view_as(total), total, atol=1e-5)


def test_accountants_that_disagree_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.accountants import PRVAccountant

    first, second = epsilons(1.1, 0.1, 50, 1e-4)
    assert first == pytest.approx(second, rel=0.02)
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda *a, **k: first * 1.1)
    with pytest.raises(TrainingError, match="accountants disagree"):
        epsilons(1.1, 0.1, 50, 1e-4)


def test_numbers_that_protect_nobody_are_refused() -> None:
    model = lmopt.Model.from_module(tiny_lstm())
    for change in ({"delta": 0.5}, {"target_epsilon": 0}, {"target_epsilon": 1e6}, {"batch_size": 0}):
        with pytest.raises(UnsupportedOptionError):
            train_private(model, OTHERS, **{"target_epsilon": 1.0, "delta": 1e-3, **change})
    with pytest.raises(UnsupportedOptionError, match="no weight fits"):
        train_private(model, OTHERS, target_epsilon=8.0, delta=1e-3, trainable=["*.lora_*"], epochs=0.3)
    with pytest.raises(InputError, match="text 0 has 1 tokens"):
        train_private(model, [[5]], target_epsilon=1.0, delta=1e-3)
    with pytest.raises(TokenizerError):
        train_private(model, ["words"], target_epsilon=1.0, delta=1e-3)
