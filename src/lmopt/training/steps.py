"""Distillation as a step of a compression recipe."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from lmopt.compression.step import plain_fields
from lmopt.errors import UnsupportedOptionError
from lmopt.model import Model
from lmopt.training.config import TrainingConfig

# Knobs of `TrainingConfig` that are fields of the step, and their names there.
_NAMED: Final = {
    "max_steps": "max_steps",
    "learning_rate": "learning_rate",
    "per_device_train_batch_size": "batch_size",
    "block_size": "block_size",
    "seed": "seed",
}


@dataclass(frozen=True, slots=True)
class Distill:
    """Trains what the steps before it have left of a model to answer as its teacher does.

    Dense models, pruned ones (zeros stay zero) and quantized ones (trained on their own grid by straight-through
    rounding) come out in the form that they had.

    Attributes:
        teacher: What to learn from: a `Model`, or what `Model.from_pretrained` takes; `None` is the model that the
            recipe began with.
        texts: Paths of text files to learn on, one or many. `None` takes the calibration texts.
        teacher_rows: Texts of `block_size` tokens that the teacher writes itself and that are learnt on beside `texts`
            (sequence-level distillation); with 1 or more no other texts are needed.
        max_steps: Optimiser steps.
        learning_rate: Peak step size of AdamW.
        batch_size: Rows a step and process.
        block_size: Tokens a row.
        temperature: Of both distributions, more than 0.
        alpha: Share of the teacher against the text's own next token, 0 .. 1.
        beta: 0 for forward KL, 1 for reverse KL, between them the generalised Jensen-Shannon divergence.
        hidden_weight: Weight of the distance of the blocks' outputs, paired uniformly; 0 leaves them alone.
        top_k: Run the teacher once and keep so many likeliest answers at each position on disk (in `folder`), so that
            it need not read each batch again; `None` keeps it in memory.
        on_policy: Share of the steps whose texts the student writes itself, 0 .. 1.
        train_from: Train the blocks from this place on only, counted from 0; what stands outside of the blocks (norms,
            embedding, head) is not trained then. Blocks before the first damage have little to learn, and cost most
            of the backward pass. `None` trains all.
        lora_rank: Train adapters of this rank and merge them, instead of all weights; `None` trains all.
        learn_scales: Of quantized models: train the scales too.
        keep_zeros: Whether linear weights that are 0 stay 0. `False` for a float model that was dequantized.
        seed: Of the order of texts and of sampling.
        folder: Where checkpoints and the teacher's answers are kept; a step that was cut off goes on from there.
        training: Further knobs by their names in `lmopt.training.TrainingConfig`, such as `{"bf16": True}`.

    Raises:
        UnsupportedOptionError: A value is impossible, or two do not go together.

    Example:
        >>> Distill(max_steps=200, training={"bf16": True}).config.lr_scheduler_type
        'cosine'
    """

    name: ClassVar[str] = "distill"
    target: ClassVar[str] = "lmopt.training.recovering:apply_distill"

    teacher: str | os.PathLike[str] | Model | None = None
    texts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
    teacher_rows: int = 0
    max_steps: int = 500
    learning_rate: float = 2e-4
    batch_size: int = 8
    block_size: int = 256
    temperature: float = 1.0
    alpha: float = 1.0
    beta: float = 0.0
    hidden_weight: float = 0.0
    top_k: int | None = None
    on_policy: float = 0.0
    train_from: int | None = None
    lora_rank: int | None = None
    learn_scales: bool = False
    keep_zeros: bool = True
    seed: int = 0
    folder: str | os.PathLike[str] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        for name, value in (("alpha", self.alpha), ("beta", self.beta), ("on_policy", self.on_policy)):
            if not 0 <= value <= 1:
                raise UnsupportedOptionError(f"{name} is {value!r}; expected 0 .. 1")
        if not 0 < self.temperature < math.inf or not 0 <= self.hidden_weight < math.inf:
            raise UnsupportedOptionError(
                f"temperature is {self.temperature!r} and hidden_weight {self.hidden_weight!r}; expected numbers, the "
                "temperature above 0"
            )
        if type(self.teacher_rows) is not int or self.teacher_rows < 0:
            raise UnsupportedOptionError(f"teacher_rows is {self.teacher_rows!r}; expected 0 or more")
        for name in ("top_k", "lora_rank"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UnsupportedOptionError(f"{name} is {value!r}; expected a whole number of at least 1")
        if self.train_from is not None and (type(self.train_from) is not int or self.train_from < 0):
            raise UnsupportedOptionError(
                f"train_from is {self.train_from!r}; expected a block's place, from 0"
            )
        if self.train_from is not None and self.lora_rank is not None:
            raise UnsupportedOptionError(
                "train_from and lora_rank do not go together: adapters are put beside all linears"
            )
        if self.top_k is not None and (self.on_policy > 0 or self.beta > 0 or self.folder is None):
            raise UnsupportedOptionError(
                f"top_k={self.top_k} keeps the teacher's likeliest answers to the texts on disk: it takes a folder, "
                "and goes with forward KL (beta=0) on texts that do not change (on_policy=0)"
            )
        if both := [name for name in self.training if name in _NAMED]:
            raise UnsupportedOptionError(
                f"training={{{both[0]!r}: ...}} is a field of its own: Distill({_NAMED[both[0]]}=...)"
            )
        _ = self.config  # refuses unknown names and impossible values

    @property
    def needs_texts(self) -> bool:
        """Whether the calibration texts are what it learns on."""
        return self.texts is None and self.teacher_rows == 0

    @property
    def config(self) -> TrainingConfig:
        """All knobs of the training."""
        usual = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.05}
        if "warmup_steps" in self.training:
            del usual["warmup_ratio"]
        own = {name: getattr(self, mine) for name, mine in _NAMED.items()}
        return TrainingConfig.from_options(**{**usual, **self.training, **own})

    def paths(self) -> list[str]:
        """Text files to learn on."""
        if self.texts is None:
            return []
        given = [self.texts] if isinstance(self.texts, str | os.PathLike) else self.texts
        return [os.fspath(one) for one in given]

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe; a `Model` as its source, by which it may be found again."""
        plain = plain_fields(self)
        for name in ("teacher", "folder"):
            value = getattr(self, name)
            if value is not None:
                plain[name] = value.source if isinstance(value, Model) else os.fspath(value)
        plain["texts"] = None if self.texts is None else self.paths()
        return plain
