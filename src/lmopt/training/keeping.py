"""When a run's checkpoints are written and read; how, is `lmopt.training.checkpointing`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.utils import _pytree as pytree

from lmopt.training import checkpointing
from lmopt.training.loop import Run


@dataclass(slots=True)
class Keeper:
    """Writes and reads a run's checkpoints.

    Attributes:
        run: The run.
        folder: Where they are.
        course: What a resuming run must have in common.
    """

    run: Run
    folder: Path
    course: checkpointing.Course

    def begin(self, resume: Literal[True, "never"]) -> None:
        """Go on from the newest checkpoint, or remove what is there."""
        run = self.run
        found = checkpointing.list_checkpoints(self.folder)
        if resume == "never":
            run.accelerator.wait_for_everyone()
            if run.accelerator.is_main_process:
                for _, path in found:
                    checkpointing.remove(path)
            run.accelerator.wait_for_everyone()
        elif found:
            run.checkpoint = found[-1][1]
            snapshot = self._snapshot([])
            states = checkpointing.restore(run.checkpoint, snapshot, self.course, run.accelerator)
            run.step, run.tokens_before = snapshot.step, run.journal.tokens
            if states:
                structure = run.learner.state_structure(run.accelerator.device)
                run.states = [pytree.tree_unflatten(leaves, structure) for leaves in states]

    def save(self) -> Path:
        """Write a checkpoint of the run as it is."""
        run = self.run
        carried = run.states if run.config.carry_state else []
        snapshot = self._snapshot([pytree.tree_leaves(state) for state in carried])
        keep = run.config.save_total_limit
        return checkpointing.save(self.folder, snapshot, self.course, run.accelerator, keep)

    def _snapshot(self, states: list[list[Tensor]]) -> checkpointing.Snapshot:
        run = self.run
        return checkpointing.Snapshot(run.learner, run.optimizer.optimizer, run.journal, states, run.step)
