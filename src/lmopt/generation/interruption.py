"""What ends rows from outside: the caller, and the clock."""

import time
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

from lmopt.errors import UnsupportedOptionError
from lmopt.generation.results import FinishReason
from lmopt.generation.rows import Row


class Cancel(Protocol):
    """Says whether to stop; a `threading.Event` does."""

    def is_set(self) -> bool:
        """Whether the work is to end."""
        ...


Cancels: TypeAlias = Cancel | Sequence[Cancel | None] | None
"""One for the whole request, or one a prompt."""


class Interruption:
    """Ends rows whose caller or clock says so.

    Args:
        cancel: One for all rows, or one a prompt.
        rows: The rows of the request.

    Raises:
        UnsupportedOptionError: The number of them is not that of prompts.
    """

    def __init__(self, cancel: Cancels, rows: Sequence[Row]) -> None:
        self._shared = None if isinstance(cancel, Sequence) else cancel
        self._own = list(cancel) if isinstance(cancel, Sequence) else []
        if self._own and len(self._own) != rows[-1].prompt + 1:
            raise UnsupportedOptionError(
                f"{len(self._own)} cancels were given for {rows[-1].prompt + 1} prompts. "
                f"Give one a prompt (or None), or just one."
            )
        self._watches = bool(self._own) or any(row.deadline is not None for row in rows)

    def mark(self, rows: Iterable[Row]) -> bool:
        """Set the `finish_reason` of rows that must end; called before each call of the engine.

        Returns:
            Whether there are such rows.
        """
        if self._shared is not None and self._shared.is_set():
            due = [row for row in rows if row.finish_reason is None]
            for row in due:
                row.finish_reason = "cancelled"
            return bool(due)
        if not self._watches:
            return False
        now, found = time.monotonic(), False
        for row in rows:
            if row.finish_reason is None:
                row.finish_reason = self._reason(row, now)
                found = found or row.finish_reason is not None
        return found

    def _reason(self, row: Row, now: float) -> FinishReason | None:
        cancel = self._own[row.prompt] if self._own else None
        if cancel is not None and cancel.is_set():
            return "cancelled"
        return "time" if row.deadline is not None and now >= row.deadline else None
