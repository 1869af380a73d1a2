"""Where a student's loss gets its teacher's answers from: the teacher itself, or what was kept of it on disk."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lmopt.backends.torch.calibration import logits_of
from lmopt.backends.torch.language_model import device_of
from lmopt.training.divergences import divergence
from lmopt.training.objective import IGNORE, Batch


class Teacher(Protocol):
    """What `lmopt.training.distillation.Distillation` asks of a teacher."""

    def divergence(self, batch: Batch, logits: Tensor, *, temperature: float, beta: float) -> Tensor:
        """Measure how far a student lies from the teacher.

        Args:
            batch: What both read.
            logits: `(rows, length, vocab_size)`, the student's, with gradient.
            temperature: See `lmopt.training.divergences.divergence`.
            beta: See there.

        Returns:
            One value in nats for each learnt position (`labels != IGNORE`), in the order of rows.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Name the teacher by plain data, so that a checkpoint is resumed with the same only."""
        ...


class LiveTeacher:
    """A teacher in memory, which reads each batch beside its student.

    Args:
        module: The teacher, in evaluation mode; it is moved to the student's device and never trained.
        name: What identifies it, such as `Model.fingerprint()`.
    """

    def __init__(self, module: nn.Module, name: str = "") -> None:
        self.module = module
        self.name = name

    def logits(self, ids: Tensor) -> Tensor:
        """Read `(rows, length)` ids; give `(rows, length, vocab_size)` logits without gradient."""
        if device_of(self.module) != ids.device:
            self.module.to(ids.device)
        with torch.no_grad():
            return logits_of(self.module, ids)

    def divergence(self, batch: Batch, logits: Tensor, *, temperature: float, beta: float) -> Tensor:
        """See `Teacher`. Of two vocabularies that are padded differently the common ids count."""
        own = self.logits(batch.input_ids)
        width = min(own.shape[-1], logits.shape[-1])
        learnt = batch.labels != IGNORE
        return divergence(
            learnt_rows(logits[..., :width], learnt),
            learnt_rows(own[..., :width], learnt),
            temperature=temperature,
            beta=beta,
        )

    def describe(self) -> Mapping[str, Any]:
        """Name the teacher."""
        return {"teacher": self.name}


def learnt_rows(values: Tensor, learnt: Tensor) -> Tensor:
    """Take what belongs to learnt positions, `(positions, ...)`; a view where all are."""
    return values.flatten(0, 1) if bool(learnt.all()) else values[learnt]
