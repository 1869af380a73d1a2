"""What training gives back, and what it says while it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmopt.evaluation import Perplexity
from lmopt.model import Model


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Perplexity of the held-out text after some steps.

    Attributes:
        step: Optimiser steps done.
        perplexity: Measured by `lmopt.evaluation.perplexity`, as for any engine.
    """

    step: int
    perplexity: Perplexity


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Where a run stands; told once a step on the CPU, every few steps on a GPU.

    Attributes:
        step: Optimiser steps done.
        total: Steps of the whole run.
        loss: Mean loss of the last step.
        learning_rate: Step size of the last step.
        tokens_per_s: Tokens learnt a second, over all processes, since this call of `train` began.
        perplexity: The last that was measured, `None` before the first.
    """

    step: int
    total: int
    loss: float
    learning_rate: float
    tokens_per_s: float
    perplexity: float | None = None


@dataclass(slots=True)
class Journal:
    """What is known of a run up to now; kept in checkpoints, so that a resumed run tells its whole story.

    Attributes:
        losses: Mean loss of each optimiser step.
        parts: Named parts of the loss, a value a step.
        evaluations: In order.
        tokens: Tokens learnt.
    """

    losses: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A trained model and how it came about.

    Attributes:
        model: In evaluation mode, on the device that it was on before; the module is the one that was given.
        losses: Mean loss of each optimiser step, in nats a token for the next-token loss, over the whole run,
            steps before a resumption included.
        parts: Named parts of the loss, a value a step.
        evaluations: Perplexity of the held-out text by step.
        steps: Optimiser steps of the whole run.
        resumed_from: Step of the checkpoint that this call went on from, 0 if it began anew.
        tokens: Tokens learnt over the whole run; a token that is read in two epochs counts twice.
        corpus: Documents, tokens and blocks of the corpus, as `{"documents": ..., "tokens": ..., "blocks": ...}`.
        seconds: Wall-clock time of this call's steps, without evaluations and checkpoints.
        tokens_per_s: Tokens learnt a second in that time, over all processes.
        processes: Processes that trained together.
        output: The folder that was given: `model/`, `checkpoints/`, `training.json`, `loss.png`.
        loss_plot: Picture of the losses, `None` without `output` or without matplotlib.
    """

    model: Model
    losses: list[float]
    parts: dict[str, list[float]]
    evaluations: list[Evaluation]
    steps: int
    resumed_from: int
    tokens: int
    corpus: Mapping[str, int]
    seconds: float
    tokens_per_s: float
    processes: int
    output: Path | None = None
    loss_plot: Path | None = None

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the held-out text at the end, `None` where none was given."""
        return self.evaluations[-1].perplexity.value if self.evaluations else None

    def to_dict(self) -> dict[str, Any]:
        """Give all but the model as plain data."""
        return {
            "losses": self.losses,
            "parts": self.parts,
            "evaluations": [
                {"step": one.step, "perplexity": one.perplexity.to_dict()} for one in self.evaluations
            ],
            "perplexity": self.perplexity,
            "steps": self.steps,
            "resumed_from": self.resumed_from,
            "tokens": self.tokens,
            "corpus": dict(self.corpus),
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "processes": self.processes,
        }
