"""Bring a student's hidden states near its teacher's, block by block.

Blocks are watched by forward hooks: no architecture is known by name, and modules of one's own will do.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from lmopt.backends.torch.calibration import find_stack, logits_of
from lmopt.backends.torch.language_model import device_of
from lmopt.backends.torch.resizing import Blocks
from lmopt.errors import ShapeError, UnsupportedError, UnsupportedOptionError
from lmopt.training.objective import IGNORE, Batch
from lmopt.training.teachers import LiveTeacher, learnt_rows

Pairs = Sequence[tuple[int, int]]
"""Places of a student's block and of the teacher's block that it is to answer like, from 0."""


def uniform_pairs(student_blocks: int, teacher_blocks: int) -> list[tuple[int, int]]:
    """Pair each block of a student with the teacher's block at the same part of the depth; last meets last.

    Args:
        student_blocks: Blocks of the student.
        teacher_blocks: Blocks of the teacher.
    """
    return [
        (place, max(0, round((place + 1) * teacher_blocks / student_blocks) - 1))
        for place in range(student_blocks)
    ]


class HiddenStates(nn.Module):
    """Mean over pairs and learnt positions of `|P x - y|^2 / |y|^2`, `x` and `y` being what two blocks give.

    Relative to the teacher's own size at each position, since single positions of a Transformer can be a thousand
    times larger than all others. `P` is the identity, or a learnt projection where the widths differ.

    Use it as a context manager, or call `close`, to take the hooks off the models.

    Args:
        student: The module that will be trained.
        teacher: The teacher, which must be in memory.
        pairs: Which block answers for which; `None` pairs them uniformly.
        projection: Whether to learn a projection for each pair from the student's width to the teacher's.

    Raises:
        UnsupportedError: A model has no list of blocks that give hidden states.
        UnsupportedOptionError: A pair names no block, or there is none.
        ShapeError: The widths differ and `projection` is `False`.

    References:
        Romero et al. 2015, FitNets, arXiv:1412.6550 (projection); Jiao et al. 2020, TinyBERT, arXiv:1909.10351.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: LiveTeacher,
        *,
        pairs: Pairs | None = None,
        projection: bool = False,
    ) -> None:
        super().__init__()
        own, others = _blocks(student), _blocks(teacher.module)
        chosen = (
            uniform_pairs(len(own), len(others)) if pairs is None else [tuple(map(int, one)) for one in pairs]
        )
        self.pairs: list[tuple[int, int]] = [(first, second) for first, second in chosen]
        _check_pairs(self.pairs, len(own), len(others))
        # Plain attributes, or the teacher would be trained with the student.
        self._seen: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
        self._live = [teacher]
        self._hooks = ExitStack()
        for places, blocks, seen in zip(
            zip(*self.pairs, strict=True), (own, others), self._seen, strict=True
        ):
            for place in set(places):
                self._hooks.callback(blocks[place].register_forward_hook(_keep(seen, place)).remove)
        widths = self._widths(student)
        self.projections = nn.ModuleList()
        if projection:
            device = device_of(student)
            for narrow, wide in widths:
                made = nn.Linear(narrow, wide, bias=False, device=device)
                # The identity as far as it goes: what is alike already stays so.
                nn.init.eye_(made.weight)
                self.projections.append(made)
        elif any(narrow != wide for narrow, wide in widths):
            self.close()
            place = next(n for n, (narrow, wide) in enumerate(widths) if narrow != wide)
            raise ShapeError(
                f"block {self.pairs[place][0]} of the student gives {widths[place][0]} values a token, block "
                f"{self.pairs[place][1]} of the teacher {widths[place][1]}; learn a map between them: "
                "HiddenStates(..., projection=True)"
            )

    def forward(self, batch: Batch) -> Tensor:
        """Compare what the last forward of both models left; the teacher reads the batch if it has not yet.

        Args:
            batch: What the student has just read.

        Returns:
            Scalar with gradient, 0 where all is alike.
        """
        mine, others = self._seen
        if not others:
            self._live[0].logits(batch.input_ids)
        learnt = batch.labels != IGNORE
        total = batch.labels.new_zeros((), dtype=torch.float32)
        for number, (first, second) in enumerate(self.pairs):
            x, y = learnt_rows(mine[first], learnt), learnt_rows(others[second], learnt).float()
            if len(self.projections):
                x = self.projections[number](x)
            total = total + ((x.float() - y).square().sum(-1) / y.square().sum(-1).clamp_min(1e-12)).mean()
        mine.clear()
        others.clear()
        return total / len(self.pairs)

    def describe(self, weight: float) -> dict[str, Any]:
        """Say by plain data what is compared, with what weight."""
        return {
            "weight": weight,
            "pairs": [list(pair) for pair in self.pairs],
            "projection": len(self.projections) > 0,
        }

    def close(self) -> None:
        """Take the hooks off both models."""
        self._hooks.close()
        for seen in self._seen:
            seen.clear()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks off."""
        self.close()

    def _widths(self, student: nn.Module) -> list[tuple[int, int]]:
        """Run both models on two tokens and see how wide their blocks are."""
        training = student.training
        with torch.no_grad():
            logits_of(student.eval(), torch.zeros(1, 2, dtype=torch.int64, device=device_of(student)))
        student.train(training)
        teacher = self._live[0]
        teacher.logits(torch.zeros(1, 2, dtype=torch.int64, device=device_of(teacher.module)))
        mine, others = self._seen
        found = [(mine[first].shape[-1], others[second].shape[-1]) for first, second in self.pairs]
        mine.clear()
        others.clear()
        return found


def _blocks(module: nn.Module) -> Blocks:
    stack = find_stack(module)
    if stack is None:
        raise UnsupportedError(
            f"{type(module).__name__} has no list of equal blocks (torch.nn.ModuleList), so its hidden states cannot "
            "be compared; distil its logits alone"
        )
    return stack[1]


def _check_pairs(pairs: list[tuple[int, int]], own: int, others: int) -> None:
    if not pairs:
        raise UnsupportedOptionError("no pair of blocks is given; leave pairs out for uniform ones")
    for first, second in pairs:
        if not (0 <= first < own and 0 <= second < others):
            raise UnsupportedOptionError(
                f"pair ({first}, {second}) names no blocks: the student has {own}, the teacher {others}, from 0"
            )


def _keep(seen: dict[int, Tensor], place: int) -> Any:
    def hook(part: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        found = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(found, Tensor) or found.dim() != 3:
            raise UnsupportedError(
                f"{type(part).__name__} gives no hidden states of shape (rows, length, width)"
            )
        seen[place] = found

    return hook
