"""The loop does what a plain one does, and says so when it cannot go on."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lmopt import Model
from lmopt.errors import DivergedError
from lmopt.testing.models import tiny_gpt, tiny_llama, tiny_lstm
from lmopt.training import (
    Batch,
    Corpus,
    LossValue,
    NextToken,
    Outputs,
    TrainingConfig,
    TrainingProgress,
    train,
)
from lmopt.training.objective import next_token_loss
from lmopt.training.sources import ContiguousStreams, ShuffledBlocks

Ids = NDArray[np.int64]
CONFIG = {
    "learning_rate": 0.01,
    "max_steps": 8,
    "block_size": 16,
    "per_device_train_batch_size": 6,
    "weight_decay": 0.1,
}


@pytest.mark.parametrize("make", [tiny_lstm, tiny_gpt, tiny_llama])
def test_losses_and_weights_are_those_of_a_plain_loop(
    make: Callable[[], nn.Module], ids: Ids, by_hand: Callable[..., list[float]]
) -> None:
    config = TrainingConfig(**CONFIG, lr_scheduler_type="cosine", warmup_steps=2)
    result = train(Model.from_module(make()), ids, config=config)
    module = make()
    expected = by_hand(module, ShuffledBlocks(Corpus(ids.astype(np.int32), 1), 16, 6, config.seed), 6, config)
    assert result.losses == pytest.approx(expected, rel=1e-6)
    assert result.losses[-1] < result.losses[0]
    # Not the weights: some, as the biases of keys, change nothing, and follow rounding alone.
    row = torch.from_numpy(ids[None, :64])
    with torch.no_grad():
        ours, theirs = (one.eval()(row) for one in (result.model.module, module))
    ours, theirs = (one.logits if hasattr(one, "logits") else one[0] for one in (ours, theirs))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_accumulation_is_a_larger_batch(ids: Ids) -> None:
    # The last block has 7 tokens: a mean of means would weight them too much.
    short = ids[: 16 * 11 + 8]
    one = train(Model.from_module(tiny_gpt()), short, config=TrainingConfig(**CONFIG))
    fields = {**CONFIG, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    many = train(Model.from_module(tiny_gpt()), short, config=TrainingConfig(**fields))
    assert many.losses == pytest.approx(one.losses, rel=1e-5)
    assert many.tokens == one.tokens == 4 * (16 * 11 + 7)


def test_epochs_are_whole_steps(ids: Ids) -> None:
    fields = {**CONFIG, "max_steps": None, "num_train_epochs": 1.5}
    result = train(Model.from_module(tiny_lstm()), ids[: 16 * 10 + 1], config=TrainingConfig(**fields))
    assert result.steps == len(result.losses) == math.ceil(1.5 * 10 / 6)
    assert result.corpus == {"documents": 1, "tokens": 161, "blocks": 10}


def test_state_is_carried_along_streams(ids: Ids, by_hand: Callable[..., list[float]]) -> None:
    config = TrainingConfig(**CONFIG, carry_state=True)
    carried = train(Model.from_module(tiny_lstm()), ids, config=config)
    streams = ContiguousStreams(Corpus(ids.astype(np.int32), 1), 16, 6)
    assert carried.losses == pytest.approx(by_hand(tiny_lstm(), streams, 6, config, carry=True), rel=1e-6)
    reset = by_hand(tiny_lstm(), streams, 6, config, carry=False)
    assert carried.losses[0] == pytest.approx(reset[0], rel=1e-6)
    assert all(abs(one - other) > 1e-4 for one, other in zip(carried.losses[1:], reset[1:], strict=True))


def test_state_begins_anew_with_each_epoch_and_splits_over_accumulation(
    ids: Ids, by_hand: Callable[..., list[float]]
) -> None:
    fields = {
        **CONFIG,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "carry_state": True,
    }
    config = TrainingConfig(**fields)
    short = ids[: 6 * 16 * 3 + 1]  # three steps an epoch
    streams = ContiguousStreams(Corpus(short.astype(np.int32), 1), 16, 6)
    assert streams.steps_per_epoch == 3
    result = train(Model.from_module(tiny_lstm()), short, config=config)
    assert result.losses == pytest.approx(by_hand(tiny_lstm(), streams, 6, config, carry=True), rel=1e-6)


class Doubled(nn.Module):
    """Next-token loss times a weight of its own, with parts."""

    hidden_states = True

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.seen: list[tuple[int, int]] = []

    def forward(self, batch: Batch, outputs: Outputs) -> LossValue:
        assert outputs.hidden_states is not None
        self.seen.append((batch.step, len(outputs.hidden_states)))
        loss = next_token_loss(outputs.logits, batch.labels)
        return LossValue(loss * self.factor, {"next_token": loss, "factor": self.factor})

    def describe(self) -> Mapping[str, Any]:
        return {"loss": "doubled"}


def test_another_loss_runs_on_the_same_loop_with_parts_and_weights_of_its_own(ids: Ids) -> None:
    loss = Doubled()
    result = train(Model.from_module(tiny_llama()), ids, config=TrainingConfig(**CONFIG), loss=loss)
    assert loss.seen == [(step, 3) for step in range(8)]
    parts = zip(result.parts["next_token"], result.parts["factor"], strict=True)
    assert result.losses == pytest.approx([one * factor for one, factor in parts], rel=1e-5)
    assert result.parts["factor"][0] == 2.0
    assert loss.factor.item() < 2.0


class BadAt(NextToken):
    """A loss, or a gradient, that is no number at one step."""

    def __init__(self, step: int, where: str) -> None:
        super().__init__()
        object.__setattr__(self, "bad", (step, where))

    __slots__ = ("bad",)

    def __call__(self, batch: Batch, outputs: Outputs) -> LossValue:
        step, where = self.bad
        value = super().__call__(batch, outputs)
        if batch.step != step:
            return value
        zero = outputs.logits.sum() * 0.0
        # The root's slope at 0 is infinite: 0 times it is NaN, in the gradient alone.
        return LossValue(value.loss + (math.nan if where == "loss" else zero.sqrt()))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_no_number_is_named_and_the_last_checkpoint_kept(
    ids: Ids, tmp_path: Path, where: str
) -> None:
    config = TrainingConfig(**CONFIG, save_steps=2)
    with pytest.raises(
        DivergedError, match=rf"{where}.* of step 6 of 8 is nan.*step-00000004.*lower"
    ) as raised:
        train(Model.from_module(tiny_llama()), ids, config=config, loss=BadAt(5, where), output=tmp_path)
    assert raised.value.step == 6
    assert raised.value.checkpoint == tmp_path / "checkpoints" / "step-00000004"
    assert not (tmp_path / "model").exists()
    # It is good: the run goes on from it, and ends as one that never failed.
    whole = train(Model.from_module(tiny_llama()), ids, config=config)
    result = train(Model.from_module(tiny_llama()), ids, config=config, output=tmp_path)
    assert result.resumed_from == 4
    assert result.losses == whole.losses


def test_progress_is_told_each_step(ids: Ids) -> None:
    told: list[TrainingProgress] = []
    config = TrainingConfig(**CONFIG, eval_steps=4)
    result = train(
        Model.from_module(tiny_lstm()), ids, evaluation=ids[:100], config=config, progress=told.append
    )
    by_step = {one.step: one for one in told}
    assert [by_step[step].loss for step in range(1, 9)] == result.losses
    assert all(one.total == 8 and one.tokens_per_s > 0 for one in told)
    assert by_step[3].perplexity is None
    assert by_step[4].perplexity == result.evaluations[0].perplexity.value
    assert [one.step for one in result.evaluations] == [4, 8]
