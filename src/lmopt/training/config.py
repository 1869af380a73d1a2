"""The knobs of training, by the names of transformers' `TrainingArguments`."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from lmopt.errors import UnsupportedOptionError

SCHEDULES: Final = ("linear", "cosine", "constant")
SHARDINGS: Final = ("none", "full")
DEVICES: Final = ("auto", "cpu", "cuda")

# What may differ between a checkpoint and the run that goes on from it: the numbers stay the same.
_FREE: Final = (
    "eval_steps",
    "eval_tokens",
    "save_steps",
    "save_total_limit",
    "device",
    "sharding",
    "gradient_checkpointing",
)
_LENGTH: Final = ("max_steps", "num_train_epochs")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How to train. Names, meanings and defaults are those of transformers, where it has the knob.

    Attributes:
        learning_rate: Peak step size of AdamW.
        weight_decay: Decoupled decay of matrices and embeddings; norms and biases never decay.
        adam_beta1: Decay of the mean of gradients.
        adam_beta2: Decay of the mean of their squares.
        adam_epsilon: Added to the root of that mean.
        lr_scheduler_type: `"linear"` or `"cosine"` fall to 0 at the last step, `"constant"` does not.
        warmup_steps: Steps in which the rate rises from 0.
        warmup_ratio: The same as a share of all steps, 0 .. 1; give one of the two.
        max_steps: Optimiser steps; `None` trains `num_train_epochs`.
        num_train_epochs: Passes over the corpus; rounded up to whole steps.
        per_device_train_batch_size: Rows that each process reads in one forward.
        gradient_accumulation_steps: Forwards of each process in one step.
        max_grad_norm: Gradients with a larger 2-norm are scaled down to it; `None` does not.
        block_size: Tokens that a row predicts; `None` takes 512, or the model's context if that is less.
        bf16: Compute in bfloat16 by autocast; weights and optimiser stay float32.
        fp16: Compute in float16 by autocast with loss scaling; needs a GPU.
        gradient_checkpointing: Keep no activations inside blocks, compute them again in the backward pass.
        carry_state: Of recurrent models: read the corpus as contiguous streams, each row going on where it
            ended the step before, from its own state without gradient (truncated back-propagation). `False`
            reads shuffled blocks, each from an empty state.
        seed: Of shuffling and of dropout.
        eval_steps: Steps between evaluations; `None` evaluates at the end only.
        eval_tokens: Use only so many tokens from the start of the evaluation text.
        save_steps: Steps between checkpoints; `None` writes one at the end only.
        save_total_limit: Checkpoints that are kept, the newest.
        sharding: `"none"` gives each process all weights (DDP), `"full"` shards weights, gradients and
            optimiser over processes (FSDP2).
        device: `"auto"` takes the process's GPU where torch has one, `"cpu"` or `"cuda"` insist.

    Raises:
        UnsupportedOptionError: A value makes no sense; the message names the field and the range.
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    max_steps: int | None = None
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = 1.0
    block_size: int | None = None
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    carry_state: bool = False
    seed: int = 42
    eval_steps: int | None = None
    eval_tokens: int | None = None
    save_steps: int | None = 500
    save_total_limit: int = 2
    sharding: str = "none"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name in ("max_steps", "block_size", "eval_steps", "save_steps"):
            if getattr(self, name) is not None:
                self._check_whole(name, 1)
        if self.eval_tokens is not None:
            self._check_whole("eval_tokens", 2)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit"):
            self._check_whole(name, 1)
        for name in ("warmup_steps", "seed"):
            self._check_whole(name, 0)
        self._check_number("learning_rate", 0, math.inf, open_start=True)
        self._check_number("weight_decay", 0, math.inf)
        self._check_number("adam_beta1", 0, 1, open_end=True)
        self._check_number("adam_beta2", 0, 1, open_end=True)
        self._check_number("adam_epsilon", 0, math.inf, open_start=True)
        self._check_number("warmup_ratio", 0, 1)
        self._check_number("num_train_epochs", 0, math.inf, open_start=True)
        if self.max_grad_norm is not None:
            self._check_number("max_grad_norm", 0, math.inf, open_start=True)
        for name in ("bf16", "fp16", "gradient_checkpointing", "carry_state"):
            if not isinstance(getattr(self, name), bool):
                raise UnsupportedOptionError(f"{name} is {getattr(self, name)!r}; expected true or false")
        for name, known in (("lr_scheduler_type", SCHEDULES), ("sharding", SHARDINGS), ("device", DEVICES)):
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise UnsupportedOptionError(f"{name} is {given!r}; expected one of {', '.join(known)}")
        if self.bf16 and self.fp16:
            raise UnsupportedOptionError("bf16 and fp16 are both set; choose one (bf16 where the GPU has it)")
        if self.warmup_steps and self.warmup_ratio:
            raise UnsupportedOptionError("warmup_steps and warmup_ratio are both set; give one of them")

    @classmethod
    def from_options(cls, **options: Any) -> "TrainingConfig":
        """Make a configuration of named values, such as those of a command line.

        Raises:
            UnsupportedOptionError: A name or a value is not known.
        """
        known = [one.name for one in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise UnsupportedOptionError(f"training has no option {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain data."""
        return asdict(self)

    def same_course(self, stored: Mapping[str, Any]) -> list[str]:
        """Name the fields by which this configuration would go on otherwise than a stored one did."""
        free = {*_FREE, *(_LENGTH if self.lr_scheduler_type == "constant" and not self.warmup_ratio else ())}
        return [
            name for name, value in asdict(self).items() if name not in free and stored.get(name) != value
        ]

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UnsupportedOptionError(f"{name} is {value!r}; expected a whole number of {least} or more")

    def _check_number(
        self, name: str, least: float, most: float, *, open_start: bool = False, open_end: bool = False
    ) -> None:
        value = getattr(self, name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if (
            not good
            or not least <= value <= most
            or (open_start and value == least)
            or (open_end and value == most)
        ):
            span = f"{'above ' if open_start else ''}{least:g}"
            upper = "" if most == math.inf else f" .. {'below ' if open_end else ''}{most:g}"
            raise UnsupportedOptionError(
                f"{name} is {value!r}; expected a number, {span}{upper or ' or more'}"
            )
