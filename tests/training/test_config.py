"""Settings are refused when they are made, with the field and its range."""

from typing import Any

import pytest
import transformers

from lmopt.errors import UnsupportedOptionError
from lmopt.training import TrainingConfig


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("learning_rate", 0.0, "above 0 or more"),
        ("learning_rate", float("nan"), "learning_rate is nan"),
        ("learning_rate", "1e-3", "expected a number"),
        ("adam_beta2", 1.0, "below 1"),
        ("max_steps", 0, "whole number of 1"),
        ("max_steps", 2.5, "whole number of 1"),
        ("gradient_accumulation_steps", True, "whole number of 1"),
        ("warmup_ratio", 1.5, "0 .. 1"),
        ("lr_scheduler_type", "cosin", "linear, cosine, constant"),
        ("sharding", "half", "none, full"),
        ("device", "cuda:1", "auto, cpu, cuda"),
        ("bf16", 1, "true or false"),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: Any, words: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=words) as raised:
        TrainingConfig(**{field: value})
    assert field in str(raised.value)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="choose one"):
        TrainingConfig(bf16=True, fp16=True)
    with pytest.raises(UnsupportedOptionError, match="give one"):
        TrainingConfig(warmup_steps=1, warmup_ratio=0.1)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"no option 'lr'; it has learning_rate"):
        TrainingConfig.from_options(lr=1.0)


def test_names_and_defaults_are_those_of_transformers() -> None:
    names = (
        "learning_rate",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "warmup_steps",
        "num_train_epochs",
        "seed",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_grad_norm",
        "bf16",
        "fp16",
        "gradient_checkpointing",
    )
    theirs = transformers.TrainingArguments(output_dir="unused")
    for name in names:
        assert getattr(TrainingConfig(), name) == getattr(theirs, name), name


def test_only_what_changes_the_numbers_keeps_from_resuming() -> None:
    stored = TrainingConfig(max_steps=10, save_steps=2).to_dict()
    assert TrainingConfig(max_steps=10, save_steps=5, eval_steps=1).same_course(stored) == []
    assert TrainingConfig(max_steps=20, seed=1).same_course(stored) == ["max_steps", "seed"]
    constant = TrainingConfig(max_steps=10, lr_scheduler_type="constant").to_dict()
    assert TrainingConfig(max_steps=20, lr_scheduler_type="constant").same_course(constant) == []
