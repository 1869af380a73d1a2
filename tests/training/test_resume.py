"""A run that was interrupted ends as one that was not, bit by bit, and no other run takes its checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lmopt import Artifact, Model
from lmopt.errors import ArtifactError, CorruptArtifactError, DiskFullError
from lmopt.testing.models import VOCAB_SIZE, tiny_gpt, tiny_llama, tiny_lstm
from lmopt.training import TrainingConfig, TrainingProgress, TrainingResult, checkpointing, train
from lmopt.training.checkpointing import list_checkpoints

Ids = NDArray[np.int64]
FIELDS: dict[str, Any] = {
    "learning_rate": 0.01,
    "max_steps": 9,
    "block_size": 16,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "eval_steps": 3,
    "save_steps": 3,
}


class WithDropout(nn.Module):
    """An LSTM whose training draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCAB_SIZE, 16)
        self.drop = nn.Dropout(0.3)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, VOCAB_SIZE)

    def forward(self, input_ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.lstm(self.drop(self.embedding(input_ids)), state)
        return self.head(self.drop(hidden)), state


class InterruptedRunError(Exception):
    """What stands for the end of a process."""


def stop_after(step: int) -> Callable[[TrainingProgress], None]:
    """Interrupt a run."""

    def tell(now: TrainingProgress) -> None:
        if now.step == step:
            raise InterruptedRunError

    return tell


def run(make: Callable[[], nn.Module], ids: Ids, folder: Path | None, **changes: Any) -> TrainingResult:
    """Train a fresh model."""
    options = {name: changes.pop(name) for name in ("progress", "resume") if name in changes}
    config = TrainingConfig(**{**FIELDS, **changes})
    return train(
        Model.from_module(make()), ids, evaluation=ids[:200], output=folder, config=config, **options
    )


@pytest.mark.parametrize("make", [tiny_gpt, tiny_llama, WithDropout])
@pytest.mark.parametrize("carry", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(
    make: Callable[[], nn.Module], carry: bool, ids: Ids, tmp_path: Path
) -> None:
    if carry and make is not WithDropout:
        make = tiny_lstm
    whole = run(make, ids, None, carry_state=carry)
    with pytest.raises(InterruptedRunError):
        run(make, ids, tmp_path, carry_state=carry, progress=stop_after(8))
    torch.manual_seed(99)  # what else happened in the process has no say
    rest = run(make, ids, tmp_path, carry_state=carry)
    assert rest.resumed_from == 6
    assert rest.losses == whole.losses
    assert rest.evaluations == whole.evaluations
    assert rest.tokens == whole.tokens
    assert rest.model.fingerprint() == whole.model.fingerprint()
    # And again, when nothing is left to do.
    done = run(make, ids, tmp_path, carry_state=carry)
    assert (done.resumed_from, done.losses) == (9, whole.losses)
    assert done.model.fingerprint() == whole.model.fingerprint()


def test_the_newest_checkpoints_are_kept_and_hold_no_pickle(ids: Ids, tmp_path: Path) -> None:
    run(tiny_lstm, ids, tmp_path, save_steps=2, save_total_limit=3)
    folder = tmp_path / "checkpoints"
    assert [step for step, _ in list_checkpoints(folder)] == [6, 8, 9]
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{step}" for step in (6, 8, 9)]
    names = {path.name for path in (folder / "step-00000009").iterdir()}
    assert all(name.endswith((".safetensors", ".json")) for name in names)
    Artifact.open(folder / "step-00000009").verify()


def test_another_run_is_refused_and_says_why(ids: Ids, tmp_path: Path) -> None:
    run(tiny_lstm, ids, tmp_path)
    with pytest.raises(ArtifactError, match=r"learning_rate was 0\.01 and is 0\.02.*no-resume"):
        run(tiny_lstm, ids, tmp_path, learning_rate=0.02)
    with pytest.raises(ArtifactError, match="the data was"):
        run(tiny_lstm, ids[1:], tmp_path)
    with pytest.raises(ArtifactError, match="another model"):
        run(tiny_gpt, ids, tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [6, 9]


def test_never_begins_anew(ids: Ids, tmp_path: Path) -> None:
    first = run(tiny_lstm, ids, tmp_path)
    again = run(tiny_lstm, ids, tmp_path, learning_rate=0.02, resume="never")
    assert again.resumed_from == 0
    assert again.losses[0] == first.losses[0]
    assert again.losses[-1] != first.losses[-1]
    assert run(tiny_lstm, ids, tmp_path, learning_rate=0.02).losses == again.losses


def test_frozen_weights_are_not_kept_but_compared(ids: Ids, tmp_path: Path) -> None:
    def make(scale: float = 1.0) -> nn.Module:
        module = tiny_llama()
        with torch.no_grad():
            module.model.embed_tokens.weight.mul_(scale)
        module.lm_head.requires_grad_(True)
        return module

    result = run(make, ids, tmp_path)
    fresh = make()
    changed = [
        name
        for (name, one), other in zip(result.model.module.named_parameters(), fresh.parameters(), strict=True)
        if not torch.equal(one, other)
    ]
    assert changed == ["lm_head.weight"]
    assert [name for name, one in result.model.module.named_parameters() if one.requires_grad] == changed
    newest = list_checkpoints(tmp_path / "checkpoints")[-1][1]
    stored = (newest / "weights.safetensors").stat().st_size
    assert stored < 1.1 * fresh.lm_head.weight.numel() * 4 + 1000
    with pytest.raises(ArtifactError, match="the frozen weights was"):
        run(lambda: make(1.5), ids, tmp_path)


def test_a_damaged_checkpoint_is_named_with_the_way_out(ids: Ids, tmp_path: Path) -> None:
    whole = run(tiny_lstm, ids, tmp_path)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1][1]
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=rf"rm -r {newest}"):
        run(tiny_lstm, ids, tmp_path)
    checkpointing.remove(newest)
    result = run(tiny_lstm, ids, tmp_path)
    assert result.resumed_from == 6
    assert result.losses == whole.losses


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    ids: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = checkpointing.save_file, []

    def full(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 6:  # the second file of the second checkpoint
            raise OSError(28, "No space left on device")
        write(*args, **options)

    monkeypatch.setattr(checkpointing, "save_file", full)
    with pytest.raises(DiskFullError):
        run(tiny_lstm, ids, tmp_path)
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    assert run(tiny_lstm, ids, tmp_path).resumed_from == 3


def test_a_half_removed_checkpoint_is_none_and_goes_with_the_next(
    ids: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_lstm, ids, tmp_path)
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.shutil, "rmtree", lambda *given, **options: None)
        checkpointing.remove(folder / "step-00000009")
    assert [step for step, _ in list_checkpoints(folder)] == [6]
    assert len(list(folder.iterdir())) == 2
    run(tiny_lstm, ids, tmp_path, save_total_limit=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000009"]


def test_the_story_of_the_whole_run_is_written_down(ids: Ids, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        run(tiny_lstm, ids, tmp_path, progress=stop_after(5))
    result = run(tiny_lstm, ids, tmp_path)
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["losses"] == result.losses
    assert len(told["losses"]) == 9
    assert told["resumed_from"] == 3
    assert told["config"] == TrainingConfig(**FIELDS).to_dict()
