"""One batch that the requests of all clients share, run by a thread of its own.

The thread runs `Runtime.run`; event loops hand it rows and get pieces of text back. A step of the batch wakes
an event loop once, however many rows it served.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmopt.errors import ClosedError, EngineError, LmoptError
from lmopt.generation.results import FinishReason
from lmopt.generation.rows import Row, decoding_failed
from lmopt.generation.streaming import RowText
from lmopt.serving.metrics import Metrics
from lmopt.serving.refusals import unavailable

if TYPE_CHECKING:
    from lmopt.runtime import Runtime

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Piece:
    """What a row has got since its last piece.

    Attributes:
        index: Number of the row in its request.
        text: Text that later tokens cannot change.
        tokens: Tokens of the row so far.
        finish_reason: Why the row ends here, `None` where it goes on.
    """

    index: int
    text: str
    tokens: int
    finish_reason: FinishReason | None


class Submission:
    """The rows of one request while they are in the batch; belongs to one event loop.

    Args:
        rows: The rows.
        streams: Whether pieces are wanted while the rows grow, or only at the end of each.

    Attributes:
        rows: The rows; the tokens and log-probabilities that a piece stands for are there to be read.
        streams: As above.
    """

    def __init__(self, rows: Sequence[Row], *, streams: bool) -> None:
        self.rows = rows
        self.streams = streams
        self.loop = asyncio.get_running_loop()
        self._pieces: list[Piece] = []
        self._waiter: asyncio.Future[None] | None = None
        self._left = len(rows)
        self._cancelled = threading.Event()
        for row in rows:
            row.cancel = self._cancelled

    def cancel(self) -> None:
        """End the rows before the next call of the engine; those that have ended stay as they are."""
        self._cancelled.set()

    def deliver(self, piece: Piece) -> None:
        """Take a piece in, on the event loop."""
        self._pieces.append(piece)
        self._left -= piece.finish_reason is not None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> list[Piece]:
        """Give the pieces that have come, once there are any; `[]` where all rows have ended."""
        while not self._pieces and self._left:
            self._waiter = self.loop.create_future()
            await self._waiter
        ready, self._pieces = self._pieces, []
        return ready


@dataclass(slots=True)
class _Entry:
    """A row inside the batch, and what is told of it."""

    submission: Submission
    index: int
    row: Row
    text: RowText
    came: float
    last: float | None = None


class SharedBatch:
    """Takes rows of any number of requests into one batch.

    Args:
        runtime: Open runtime of a model with a tokenizer; stays the caller's to close.
        max_queue: Most rows beyond `max_num_seqs`.

    Attributes:
        metrics: What is counted.
    """

    def __init__(self, runtime: "Runtime", max_queue: int) -> None:
        self.metrics = Metrics()
        self._runtime = runtime
        self._places = runtime.report().limits.max_num_seqs
        self._most = self._places + max_queue
        self._inside: dict[int, _Entry] = {}  # by the identity of the row; of the thread alone
        self._rows = 0  # inside or on the way; of the event loop alone
        self._new: list[list[_Entry]] = []
        self._arrived = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="lmopt-batch", daemon=True)

    @property
    def most_rows(self) -> int:
        """Most rows at any time, those that wait included."""
        return self._most

    @property
    def rows(self) -> dict[str, int]:
        """Rows that have a place in the batch, and rows that wait for one."""
        running = min(self._rows, self._places)
        return {"running": running, "waiting": self._rows - running}

    @property
    def problem(self) -> str:
        """Why no row is taken at present, `""` if one is."""
        try:
            self._runtime.engine  # noqa: B018 - says whether it is closed
        except ClosedError as error:
            return str(error)
        return "the server is stopping" if self._stopping else ""

    def start(self) -> None:
        """Begin to work; calling it twice is harmless."""
        if self._thread.ident is None:
            self._thread.start()

    def submit(self, rows: Sequence[Row], *, streams: bool) -> Submission:
        """Let rows enter as soon as there is room; to be called on an event loop.

        Args:
            rows: From `Runtime.rows`.
            streams: As for `Submission`.

        Raises:
            RefusedError: There is no room in the queue, or the server is stopping.
        """
        self.check(len(rows))
        submission = Submission(rows, streams=streams)
        tokenizer, now = self._runtime.tokenizer, time.perf_counter()
        assert tokenizer is not None
        entries = [
            _Entry(submission, index, row, RowText(row, tokenizer), now) for index, row in enumerate(rows)
        ]
        self.start()  # some servers do not tell applications that they begin
        with self._arrived:
            self.check(0)  # once more: the thread may have ended just now
            self._new.append(entries)
            self._arrived.notify()
        self._rows += len(rows)
        return submission

    def check(self, count: int) -> None:
        """See whether so many rows may enter.

        Raises:
            RefusedError: As for `submit`.
        """
        if self.problem:
            raise unavailable(self.problem, code="stopping")
        if self._rows + count > self._most:
            raise unavailable(
                f"{self._rows} rows are running or waiting, of {self._most} at most; this request has {count}. Try "
                "again later, or start the server with a larger --max-queue",
                code="overloaded",
                retry_after_s=self._retry_after_s(count),
            )

    def stop(self) -> None:
        """Take no more rows; those that are there go on to their end."""
        with self._arrived:
            self._stopping = True
            self._arrived.notify()

    def abort(self) -> None:
        """Stop, and end all rows as they are."""
        self.stop()
        for entry in [*self._inside.values(), *(one for request in self._new for one in request)]:
            entry.submission.cancel()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread; say whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # The thread ---------------------------------------------------------------------------------

    def take(self, *, wait: bool) -> list[list[Row]] | None:
        """Hand new rows to the batch; see `lmopt.generation.batching.Arrivals`."""
        self._settle()
        with self._arrived:
            while wait and not self._new and not self._stopping:
                self._arrived.wait()
            new, self._new = self._new, []
            stopping = self._stopping
        for request in new:
            self._inside.update({id(entry.row): entry for entry in request})
        if stopping and not new:
            return None
        return [[entry.row for entry in request] for request in new]

    def _work(self) -> None:
        while True:
            try:
                for given in self._runtime.run(self):
                    self._tell(given)
                self._settle()
                return
            except ClosedError as error:
                self._fail(error.with_traceback(None))
                return
            except Exception as error:
                # The states of all rows are gone; the engine itself is open, and takes new ones.
                _logger.exception("the batch failed; its %d rows end", len(self._inside))
                failure = (
                    error
                    if isinstance(error, LmoptError)
                    else EngineError(f"{type(error).__name__}: {error}")
                )
                self._fail(failure.with_traceback(None))

    def _tell(self, given: Sequence[Row]) -> None:
        """Pass on what rows have just been given."""
        now = time.perf_counter()
        told: list[tuple[_Entry, Piece]] = []
        gaps, firsts = [], []
        for row in given:
            entry = self._inside[id(row)]
            if entry.last is None:
                firsts.append(now - entry.came)
            else:
                gaps.append(now - entry.last)
            entry.last = now
            if row.finish_reason is None and not entry.submission.streams:
                continue
            try:
                text = entry.text.push()
            except Exception as error:
                row.fail(decoding_failed(error))
                continue  # `_settle` tells of it
            if row.finish_reason is not None:
                told.append((entry, self._last(entry, text)))
            elif text or row.config.wants_logprobs:
                told.append(
                    (entry, Piece(entry.index, text, row.history.length - row.history.prompt_length, None))
                )
        self.metrics.note_tokens(gaps, firsts, len(given))
        self._deliver(told)
        if self._stopping:
            self._settle()  # `take` is not called any more

    def _settle(self) -> None:
        """Tell of rows that have ended without a token: cancelled, out of time, or failed."""
        ended = [entry for entry in self._inside.values() if entry.row.finish_reason is not None]
        self._deliver([(entry, self._last(entry, "")) for entry in ended])

    def _fail(self, error: LmoptError) -> None:
        """End all rows with an error."""
        with self._arrived:
            new, self._new = self._new, []
        for request in new:
            self._inside.update({id(entry.row): entry for entry in request})
        for entry in self._inside.values():
            entry.row.fail(error)
        self._settle()

    def _last(self, entry: _Entry, text: str) -> Piece:
        """Make the last piece of a row, and forget the row."""
        row = entry.row
        if row.error is None:
            try:
                text += entry.text.finish()
            except Exception as error:
                row.fail(decoding_failed(error))
        del self._inside[id(row)]
        self.metrics.prompt_tokens += row.history.prompt_length
        self.metrics.row_s.append(time.perf_counter() - entry.came)
        return Piece(entry.index, text, row.history.length - row.history.prompt_length, row.finish_reason)

    def _deliver(self, told: list[tuple[_Entry, Piece]]) -> None:
        for loop in {entry.submission.loop for entry, _ in told}:
            mine = [(entry.submission, piece) for entry, piece in told if entry.submission.loop is loop]
            try:
                loop.call_soon_threadsafe(self._arrive, mine)
            except RuntimeError:
                _logger.debug("an event loop is closed; nobody waits for its rows")

    # The event loop -----------------------------------------------------------------------------

    def _arrive(self, told: list[tuple[Submission, Piece]]) -> None:
        for submission, piece in told:
            self._rows -= piece.finish_reason is not None
            submission.deliver(piece)

    def _retry_after_s(self, count: int) -> int:
        """Guess when there will be room: rows leave as fast as the last ones did."""
        times = list(self.metrics.row_s)
        if not times:
            return 1
        seconds = sum(times) / len(times) * count / self._places
        return max(1, min(60, round(seconds)))
