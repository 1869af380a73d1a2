"""What is minimised: the one place where methods of training differ; everything else is `lmopt.training.loop`.

A method (maximum likelihood, distillation, quantization-aware recovery) is a `Loss`: it is given what the
model read and what it answered, and returns one number to minimise and its named parts. Losses that have
weights of their own (a projection between hidden sizes) are `torch.nn.Module`s too: these weights are trained,
synchronised between processes and kept in checkpoints like the model's. A teacher is no part of such a module,
or it would be hashed and put into training mode with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import functional

from lmopt.types import IntArray

IGNORE: Final = -100
"""Label of a position that is not learnt: the padding of the last block, or a prompt."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model reads in one forward, and what should follow.

    Attributes:
        input_ids: `(rows, length)` int64, on the device that trains.
        labels: `(rows, length)` int64, the token that follows each of `input_ids` (already shifted), or
            `IGNORE`. At least one position of a batch is learnt.
        blocks: `(rows,)` int64 on the CPU: number of each row's block in the corpus, the same in every epoch
            and on every machine: the key to what was computed for it ahead, such as a teacher's logits.
        step: Optimiser step that the batch belongs to, from 0.
    """

    input_ids: Tensor
    labels: Tensor
    blocks: IntArray
    step: int


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the model answered.

    Attributes:
        logits: `(rows, length, vocab_size)`, with gradient; float32, or the type of mixed precision.
        hidden_states: Output of the embedding and of each block, `(rows, length, hidden)` each, where the loss
            asked for them (`Loss.hidden_states`); else `None`.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class LossValue:
    """One value of a loss.

    Attributes:
        loss: Scalar with gradient, a MEAN over the learnt positions of the batch (`labels != IGNORE`). The loop
            weights it by their number, so that accumulation and many processes give the mean of the whole.
        parts: Further scalars to watch, such as `{"distillation": ..., "next_token": ...}`, means in the same
            sense; they are detached by the loop, averaged over processes, and given in the result.
    """

    loss: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Loss(Protocol):
    """A method of training."""

    @property
    def hidden_states(self) -> bool:
        """Whether `Outputs.hidden_states` are needed (transformers models only)."""
        ...

    def __call__(self, batch: Batch, outputs: Outputs) -> LossValue:
        """Judge what the model answered. Runs within mixed precision's autocast, if any."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Say by plain data what is minimised; a checkpoint is resumed only by a loss that says the same."""
        ...


@dataclass(frozen=True, slots=True)
class NextToken:
    """Maximum likelihood: mean negative log-likelihood of the next token, in nats."""

    hidden_states: bool = field(default=False, init=False)

    def __call__(self, batch: Batch, outputs: Outputs) -> LossValue:
        """Return the cross entropy of the learnt positions."""
        return LossValue(next_token_loss(outputs.logits, batch.labels))

    def describe(self) -> Mapping[str, Any]:
        """Name the loss."""
        return {"loss": "next_token"}


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy, computed in float32.

    Args:
        logits: `(rows, length, vocab_size)`.
        labels: `(rows, length)` int64, at least one of them not `IGNORE`.

    Returns:
        Scalar, in nats a learnt token.
    """
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
