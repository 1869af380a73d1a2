"""What goes in, what comes out, and what is left as it was."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from numpy.typing import NDArray
from torch import nn

from lmopt import Model, Runtime
from lmopt.errors import (
    ArtifactExistsError,
    ContextLengthError,
    DeviceError,
    InputError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.testing.models import tiny_gpt, tiny_llama, tiny_lstm
from lmopt.training import TrainingConfig, train

Ids = NDArray[np.int64]


def config(**changes: Any) -> TrainingConfig:
    fields = {"learning_rate": 0.01, "max_steps": 4, "block_size": 16, "per_device_train_batch_size": 4}
    return TrainingConfig(**{**fields, **changes})


def test_nothing_heavy_is_imported_until_it_is_used() -> None:
    code = (
        "import sys, lmopt.training as t; t.TrainingConfig(max_steps=1); assert 'train' in dir(t)\n"
        "assert not {'torch', 'accelerate', 'transformers', 'matplotlib', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_held_out_perplexity_is_what_runtime_measures(ids: Ids) -> None:
    result = train(Model.from_module(tiny_llama()), ids, evaluation=ids[:333], config=config())
    with Runtime(result.model, backend="torch") as runtime:
        expected = runtime.perplexity(ids[:333], context=16, stride=16)
    assert result.perplexity == pytest.approx(expected.value, rel=1e-5)
    assert result.evaluations[-1].perplexity.tokens_scored == expected.tokens_scored
    few = train(Model.from_module(tiny_llama()), ids, evaluation=ids, config=config(eval_tokens=50))
    assert few.evaluations[-1].perplexity.tokens == 50


def test_the_output_can_be_loaded_and_says_what_happened(ids: Ids, tmp_path: Path) -> None:
    result = train(Model.from_module(tiny_llama()), ids, output=tmp_path / "a" / "out", config=config())
    loaded = Model.from_pretrained(tmp_path / "a" / "out" / "model")
    assert loaded.fingerprint() == result.model.fingerprint()
    assert result.loss_plot == tmp_path / "a" / "out" / "loss.png"
    assert result.loss_plot.read_bytes()[:4] == b"\x89PNG"
    found = sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    assert found == ["checkpoints", "loss.png", "model", "training.json"]


def test_an_own_module_is_saved_and_read_back(ids: Ids, tmp_path: Path) -> None:
    result = train(Model.from_module(tiny_lstm()), ids, output=tmp_path, config=config())
    again = Model.from_module(tiny_lstm(seed=1)).load_weights(tmp_path / "model")
    assert again.fingerprint() == result.model.fingerprint()


def test_the_module_is_trained_in_place_and_left_fit_for_inference(ids: Ids) -> None:
    module = tiny_llama()
    before = {name: one.clone() for name, one in module.named_parameters()}
    random = torch.get_rng_state()
    result = train(Model.from_module(module), ids, config=config(bf16=True))
    assert result.model.module is module
    assert not any(part.training for part in module.modules())
    assert not any(one.requires_grad or one.grad is not None for one in module.parameters())
    assert all(not torch.equal(one, before[name]) for name, one in module.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert "forward" not in vars(module)


def test_mixed_precision_computes_in_bfloat16(ids: Ids) -> None:
    exact = train(Model.from_module(tiny_llama()), ids, config=config())
    mixed = train(Model.from_module(tiny_llama()), ids, config=config(bf16=True))
    assert mixed.losses == pytest.approx(exact.losses, rel=0.02)
    assert all(abs(one - other) > 1e-6 for one, other in zip(exact.losses, mixed.losses, strict=True))
    assert mixed.model.module.lm_head.weight.dtype == torch.float32


def test_gradient_checkpointing_changes_no_loss(ids: Ids) -> None:
    plain = train(Model.from_module(tiny_llama()), ids, config=config())
    module = tiny_llama()
    passes = []
    module.model.layers[0].mlp.register_forward_pre_hook(lambda *given: passes.append(1))
    saving = train(Model.from_module(module), ids, config=config(gradient_checkpointing=True))
    assert saving.losses == pytest.approx(plain.losses, rel=1e-6)
    # Beside what from_module and train look at, each step runs the block twice.
    once = len(passes)
    train(Model.from_module(module), ids, config=config())
    assert once - (len(passes) - once) == 4
    with pytest.raises(UnsupportedError, match="no gradient checkpointing"):
        train(Model.from_module(tiny_gpt()), ids, config=config(gradient_checkpointing=True))


def test_another_user_of_accelerate_in_this_process_is_not_disturbed(
    ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests before this one may have chosen a precision for the process: lm-eval's own model does.
    for one in (AcceleratorState, PartialState, GradientState):
        monkeypatch.setattr(one, "_shared_state", {})
    theirs = Accelerator(mixed_precision="bf16", cpu=True)
    train(Model.from_module(tiny_lstm()), ids, config=config())
    assert theirs.mixed_precision == "bf16"
    assert theirs.num_processes == 1
    assert theirs.prepare(nn.Linear(2, 2))(torch.ones(1, 2)).dtype == torch.float32


def test_the_seed_decides_order_and_nothing_else_does(ids: Ids) -> None:
    def losses(**changes: Any) -> list[float]:
        return train(Model.from_module(tiny_lstm()), ids, config=config(**changes)).losses

    first = losses()
    torch.manual_seed(7)
    assert losses() == first
    assert losses(seed=1) != first


def test_what_cannot_be_trained_is_refused(ids: Ids, tmp_path: Path) -> None:
    with pytest.raises(ContextLengthError, match="128 positions"):
        train(Model.from_module(tiny_llama()), ids, config=config(block_size=129))
    with pytest.raises(UnsupportedError, match=r"is bfloat16.*dtype='float32'"):
        train(Model.from_module(tiny_llama().bfloat16()), ids, config=config())
    with pytest.raises(UnsupportedError, match="recurrent"):
        train(Model.from_module(tiny_gpt()), ids, config=config(carry_state=True))
    with pytest.raises(InputError, match="data is None"):
        train(Model.from_module(tiny_lstm()), None, config=config())
    with pytest.raises(InputError, match="'never'"):
        train(Model.from_module(tiny_lstm()), ids, config=config(), resume=False)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedOptionError, match="only one"):
        train(Model.from_module(tiny_lstm()), ids, config=config(sharding="full"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactExistsError, match="rm -r"):
        train(Model.from_module(tiny_lstm()), ids, config=config(), output=tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no usable CUDA"):
            train(Model.from_module(tiny_lstm()), ids, config=config(device="cuda"))
        with pytest.raises(UnsupportedOptionError, match="fp16 needs a GPU"):
            train(Model.from_module(tiny_lstm()), ids, config=config(fp16=True))


def test_after_a_refusal_the_module_is_as_before(ids: Ids) -> None:
    module = tiny_gpt()
    with pytest.raises(UnsupportedError):
        train(Model.from_module(module), ids, config=config(carry_state=True))
    assert not any(one.requires_grad for one in module.parameters())
    assert not module.training


def test_a_bar_shows_loss_and_time_left(ids: Ids, capsys: pytest.CaptureFixture[str]) -> None:
    train(Model.from_module(tiny_lstm()), ids, evaluation=ids[:50], config=config(), progress=True)
    shown = capsys.readouterr()
    assert "step 4/4" in shown.err
    assert "loss " in shown.err
    assert "held-out perplexity" in shown.err
    assert shown.out == ""
