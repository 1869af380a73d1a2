"""Where a verb's words go: results to stdout, as tables or as JSON; notes and progress to stderr."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, TaskID

Tell: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of a stage of the work, the steps done and their total."""

# Of a pipe or a log file, which have no width of their own: tables are not to be folded there.
_WIDTH: Final = 160
_STYLES: Final = {"ok": "green", "ready": "green", "yes": "green", "warning": "yellow", "missing": "yellow"}
_STYLES_BAD: Final = ("broken", "FAILED", "no", "failed")


class Output:
    """The streams of one verb.

    Args:
        stdout: Takes results.
        stderr: Takes notes, errors and progress.
        as_json: Whether results are JSON.

    Attributes:
        ok: Whether no check has failed so far.
    """

    def __init__(self, stdout: TextIO, stderr: TextIO, *, as_json: bool) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.as_json = as_json
        self.ok = True
        self._results = _console(stdout)
        self._notes = _console(stderr)

    @property
    def live(self) -> bool:
        """Whether somebody watches: progress bars are shown then."""
        return self._notes.is_terminal and not self.as_json

    def result(self, value: Mapping[str, Any]) -> None:
        """Write the verb's result, if JSON was asked for; `ok` is put in front."""
        if self.as_json:
            text = json.dumps(_plain({"ok": self.ok, **value}), ensure_ascii=False, allow_nan=False)
            self.stdout.write(text + "\n")
            self.stdout.flush()

    def text(self, text: str, *, end: str = "\n", style: str | None = None) -> None:
        """Write words that are part of the result for people; silent for JSON."""
        if not self.as_json:
            self._results.print(text, end=end, style=style, soft_wrap=True)
            self.stdout.flush()

    def raw(self, text: str) -> None:
        """Write generated text as it is, at once; silent for JSON."""
        if not self.as_json:
            self.stdout.write(text)
            self.stdout.flush()

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, left: int = 1
    ) -> None:
        """Write a table for people; silent for JSON.

        Args:
            header: Names of the columns.
            rows: Cells as text.
            title: Line above the table.
            left: So many columns are aligned to the left, the others hold figures.
        """
        if self.as_json:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False
        )
        for place, name in enumerate(header):
            table.add_column(name, justify="left" if place < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        self._results.print(table)

    def note(self, text: str) -> None:
        """Say something beside the result."""
        self._notes.print(text, style="dim", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Say something beside the result that should not be missed."""
        self._notes.print(text, style="yellow", soft_wrap=True)

    def error(self, error: Exception) -> None:
        """Report what stopped the verb, and mark the check as failed."""
        self.ok = False
        kind = type(error).__name__
        self._notes.print(f"{kind}: {error}", style="red", soft_wrap=True)
        report = getattr(error, "report", None)
        about = {"parity": report.to_dict()} if report is not None else {}
        self.result({"error": {"type": kind, "message": str(error)}, **about})

    @contextmanager
    def progress(self, *, unit: str = "") -> Iterator[Tell]:
        """Show a bar with the time left for each stage of some work; a line a stage where nobody watches.

        Args:
            unit: What the steps are, to show their number and how many are done in a second.
        """
        if not self.live:
            told: set[str] = set()

            def note(stage: str, done: int, total: int) -> None:
                if stage not in told:
                    told.add(stage)
                    self.note(stage)

            yield note
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        stages: dict[str, TaskID] = {}
        counts = (MofNCompleteColumn(), _speed_column(unit)) if unit else ()
        with Progress(*columns, *counts, *times, console=self._notes, transient=True) as bars:

            def tell(stage: str, done: int, total: int) -> None:
                if stage not in stages:
                    stages[stage] = bars.add_task(stage, total=None)
                # A single step tells nothing of the time left: the bar pulses until it is done.
                known = total if total > 1 or done else None
                bars.update(stages[stage], completed=done, total=known)

            yield tell


def _speed_column(unit: str) -> "ProgressColumn":
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} {unit}/s")

    return Speed()


def size(count: float | None) -> str:
    """Write a number of bytes for people.

    >>> size(98_362_432), size(1_580_000_000), size(None)
    ('98 MB', '1.58 GB', '-')
    """
    if count is None:
        return "-"
    if count < 1e9:
        return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
    return f"{count / 1e9:.2f} GB"


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    # Square brackets are part of pip lines and of model output: no markup.
    width = None if stream.isatty() else _WIDTH
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width)


def _style(cell: str) -> str:
    if cell in _STYLES_BAD:
        return "bold red"
    return _STYLES.get(cell, "")


def _plain(value: Any) -> Any:
    """Make plain data of dataclasses, tuples and arrays' numbers; JSON has no NaN and no infinity."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)
