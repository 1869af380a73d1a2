"""What ends rows from outside: the caller, and the clock."""

import time
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from lmopt.errors import UnsupportedOptionError
from lmopt.generation.results import FinishReason
from lmopt.generation.rows import Cancel, Row

Cancels: TypeAlias = Cancel | Sequence[Cancel | None] | None
"""One for the whole request, or one a prompt."""


class Interruption:
    """Ends rows whose caller or clock says so.

    Args:
        cancel: One for all rows, or one a prompt, which its rows are given.
        rows: The rows of the request.

    Raises:
        UnsupportedOptionError: The number of them is not that of prompts.
    """

    def __init__(self, cancel: Cancels, rows: Sequence[Row]) -> None:
        self._shared = None if isinstance(cancel, Sequence) else cancel
        if isinstance(cancel, Sequence) and cancel:
            if len(cancel) != rows[-1].prompt + 1:
                raise UnsupportedOptionError(
                    f"{len(cancel)} cancels were given for {rows[-1].prompt + 1} prompts. "
                    f"Give one a prompt (or None), or just one."
                )
            for row in rows:
                row.cancel = cancel[row.prompt]

    def mark(self, rows: Iterable[Row]) -> bool:
        """Set the `finish_reason` of rows that must end; called before each call of the engine.

        Args:
            rows: Rows that are being read or decoded, or wait for it.

        Returns:
            Whether there are such rows.
        """
        if self._shared is not None and self._shared.is_set():
            due = [row for row in rows if row.finish_reason is None]
            for row in due:
                row.finish_reason = "cancelled"
            return bool(due)
        found = False
        for row in rows:
            if row.finish_reason is None:
                row.finish_reason = _reason(row)
                found = found or row.finish_reason is not None
        return found


def _reason(row: Row) -> FinishReason | None:
    if row.cancel is not None and row.cancel.is_set():
        return "cancelled"
    return "time" if row.deadline is not None and time.monotonic() >= row.deadline else None
