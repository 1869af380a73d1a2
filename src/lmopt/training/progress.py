"""A bar with loss, speed and time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from lmopt.errors import NotInstalledError
from lmopt.registry import pip_line
from lmopt.spec import Requirement
from lmopt.training.result import TrainingProgress

Progress: TypeAlias = bool | Callable[[TrainingProgress], None]
"""`True` shows a bar on stderr; a function is told instead; `False` is silent."""


@contextmanager
def showing(progress: Progress, *, is_main: bool) -> Iterator[Callable[[TrainingProgress], None]]:
    """Give the function that the loop tells.

    Args:
        progress: What the user asked for.
        is_main: Whether this is the process that speaks for all.

    Raises:
        NotInstalledError: A bar is asked for, but rich is missing.
    """
    if progress is False or not is_main:
        yield lambda now: None
    elif progress is True:
        with _bar() as tell:
            yield tell
    else:
        yield progress


def describe(now: TrainingProgress) -> str:
    """Say in a few words where a run stands."""
    words = f"loss {now.loss:.3f}, {now.tokens_per_s:,.0f} tokens/s"
    return words if now.perplexity is None else f"{words}, held-out perplexity {now.perplexity:.2f}"


@contextmanager
def _bar() -> Iterator[Callable[[TrainingProgress], None]]:
    if not Requirement("rich", "").is_met():
        extra = '"lmopt[train]"'
        raise NotInstalledError(f"progress=True needs rich, which this Python lacks: {pip_line(extra)}")
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("begin", total=None)

        def tell(now: TrainingProgress) -> None:
            bars.update(task, completed=now.step, total=now.total, description=describe(now))

        yield tell
