"""The one training loop: steps of gradient descent on any loss, in one process or many."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lmopt.errors import DivergedError
from lmopt.training.config import TrainingConfig
from lmopt.training.evaluating import HeldOut
from lmopt.training.learner import Learner
from lmopt.training.objective import IGNORE, Batch
from lmopt.training.result import Evaluation, Journal, TrainingProgress
from lmopt.training.schedule import learning_rate
from lmopt.training.sources import Source

_FLUSH_STEPS: Final = 10
"""Steps between looks at the losses where looking waits for a GPU or for other processes."""

Tell = Callable[[TrainingProgress], None]


@dataclass(slots=True)
class Run:
    """A training in progress.

    Attributes:
        accelerator: Knows device, processes and precision.
        learner: Model and loss.
        wrapped: What is called in their place: the learner, or DDP around it.
        optimizer: accelerate's wrapper of the optimiser.
        source: Where batches come from.
        config: The knobs.
        total: Optimiser steps of the whole run.
        journal: What is known of the run.
        checkpoint: The newest checkpoint.
        step: Steps done.
        states: Carried state of each accumulation's rows; `None` at their start.
        seconds: Time of the steps of this process.
        tokens_before: Tokens learnt before this process took over.
    """

    accelerator: Accelerator
    learner: Learner
    wrapped: nn.Module
    optimizer: AcceleratedOptimizer
    source: Source
    config: TrainingConfig
    total: int
    journal: Journal
    checkpoint: Path | None = None
    step: int = 0
    states: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    tokens_before: int = 0
    _pending: list[Tensor] = field(default_factory=list)
    _part_names: list[str] = field(default_factory=list)

    def finish(
        self,
        *,
        held_out: HeldOut | None,
        save: Callable[[], Path] | None,
        tell: Tell,
    ) -> None:
        """Take all steps that are left, with evaluations and checkpoints between them.

        Args:
            held_out: What to evaluate on.
            save: Writes a checkpoint of this run and gives its folder.
            tell: Told of progress.

        Raises:
            DivergedError: A loss or a gradient is not finite.
        """
        alone_on_cpu = self.accelerator.num_processes == 1 and self.accelerator.device.type == "cpu"
        self.wrapped.train()
        while self.step < self.total:
            began = time.perf_counter()
            self._take_step()
            evaluates = held_out is not None and self._is_due(self.config.eval_steps)
            saves = save is not None and self._is_due(self.config.save_steps)
            looks = alone_on_cpu or evaluates or saves or self._is_due(_FLUSH_STEPS)
            if looks:
                self._flush()
            self.seconds += time.perf_counter() - began
            if looks:
                tell(self._progress())
            if evaluates and held_out is not None:
                self.journal.evaluations.append(Evaluation(self.step, held_out.measure()))
                tell(self._progress())
            if saves and save is not None:
                self.checkpoint = save()

    @property
    def tokens_per_s(self) -> float:
        """Tokens learnt a second by this call, over all processes."""
        return (self.journal.tokens - self.tokens_before) / self.seconds if self.seconds else 0.0

    def _is_due(self, every: int | None) -> bool:
        return self.step == self.total or (every is not None and self.step % every == 0)

    def _take_step(self) -> None:
        """Read the step's rows, in as many forwards as accumulation asks for, and move the weights once."""
        world, accumulation = self.accelerator.num_processes, self.config.gradient_accumulation_steps
        if self.source.begins(self.step) or not self.states:
            self.states = [None] * accumulation
        batches = [self._batch(place) for place in range(accumulation)]
        counts = [count for _, count in batches]
        learnt = torch.tensor(sum(counts), dtype=torch.float64, device=self.accelerator.device)
        if world > 1:
            torch.distributed.all_reduce(learnt)
        reports: list[Tensor] = []
        for place, (batch, count) in enumerate(batches):
            with self._synchronised(place == accumulation - 1):
                loss, parts, self.states[place] = self.wrapped(batch, self.states[place])
                # Mean over what all processes learn in this step; their gradients are averaged, hence `world`.
                weight = (count / learnt).float()
                self.accelerator.backward(loss * (weight * world))
            self._part_names = list(parts)
            reports.append(torch.stack([loss.detach(), *parts.values()]).float() * weight)
        norm = self.accelerator.clip_grad_norm_(self._parameters(), self.config.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step, self.total)
        self.optimizer.step()
        self.optimizer.zero_grad()
        # The norm is the same everywhere: divided, it survives the sum over processes.
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        tail = torch.stack([norm.float().to(learnt.device), learnt.float()]) / world
        self._pending.append(torch.cat([torch.stack(reports).sum(0), tail]))
        self.step += 1

    def _batch(self, place: int) -> tuple[Batch, int]:
        """Give this process's rows of one forward, and the number of tokens to learn in them."""
        rows = self.config.per_device_train_batch_size
        first = (place * self.accelerator.num_processes + self.accelerator.process_index) * rows
        found = self.source.rows(self.step, first, first + rows)
        device = self.accelerator.device
        ids, labels = (torch.from_numpy(one).to(device) for one in (found.input_ids, found.labels))
        return Batch(ids, labels, found.blocks, self.step), int((found.labels != IGNORE).sum())

    def _synchronised(self, wanted: bool) -> AbstractContextManager[Any]:
        """Let processes exchange gradients in the backward pass, or keep them to themselves."""
        if isinstance(self.learner.module, FSDPModule):
            self.learner.module.set_requires_gradient_sync(wanted)
            return nullcontext()
        return nullcontext() if wanted else self.accelerator.no_sync(self.wrapped)

    def _parameters(self) -> list[nn.Parameter]:
        return [one for group in self.optimizer.param_groups for one in group["params"]]

    def _flush(self) -> None:
        """Read the losses of the last steps from the device, and see that they are numbers."""
        if not self._pending:
            return
        found = torch.stack(self._pending)
        self._pending.clear()
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(found)
        first = self.step - len(found)
        for place, (loss, *parts, norm, learnt) in enumerate(found.tolist()):
            # Loss scaling in float16 finds its factor by overflowing: it skips such steps itself.
            bad = "loss" if not math.isfinite(loss) else "gradient's norm" if not math.isfinite(norm) else ""
            if bad == "loss" or (bad and self.accelerator.scaler is None):
                raise self._diverged(first + place, bad, loss if bad == "loss" else norm)
            self.journal.losses.append(loss)
            for name, part in zip(self._part_names, parts, strict=True):
                self.journal.parts.setdefault(name, []).append(part)
            self.journal.tokens += round(learnt)

    def _diverged(self, step: int, what: str, value: float) -> DivergedError:
        kept = (
            f"The last good checkpoint is {self.checkpoint}"
            if self.checkpoint
            else "No checkpoint was written yet"
        )
        return DivergedError(
            f"the {what} of step {step + 1} of {self.total} is {value}: training has diverged. {kept}. Try a lower "
            f"learning_rate (it is {self.config.learning_rate:g}), more warmup_steps, or max_grad_norm=1.",
            step=step + 1,
            checkpoint=self.checkpoint,
        )

    def _progress(self) -> TrainingProgress:
        evaluations = self.journal.evaluations
        return TrainingProgress(
            step=self.step,
            total=self.total,
            loss=self.journal.losses[-1],
            learning_rate=learning_rate(self.config, self.step - 1, self.total),
            tokens_per_s=self.tokens_per_s,
            perplexity=evaluations[-1].perplexity.value if evaluations else None,
        )
