"""What the server does with a request, from its body to the answer; HTTP itself is in `lmopt.serving.app`."""

import asyncio
import hmac
import logging
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from lmopt import __version__
from lmopt.errors import TokenizerError
from lmopt.generation.scoring import score_with_top
from lmopt.generation.streaming import IncrementalText
from lmopt.serving.answers import (
    DONE,
    Answer,
    Choice,
    Scored,
    prompt_scored,
    sse,
    together,
    usage,
)
from lmopt.serving.batch import Piece, SharedBatch, Submission
from lmopt.serving.body import Body
from lmopt.serving.limits import ServeLimits
from lmopt.serving.orders import Order
from lmopt.serving.refusals import RefusedError, refusal, unavailable
from lmopt.serving.spelling import Spelling

if TYPE_CHECKING:
    from lmopt.runtime import Runtime

_logger = logging.getLogger(__name__)
Read = Callable[[Body, "Runtime", ServeLimits], Order]
_LEFT: Final = 499
"""Status that nobody sees: the client has gone."""


class Service:
    """One model, as a service.

    Args:
        runtime: Open runtime; stays the caller's to close.
        name: Name of the model for clients; `None` takes that of its folder.
        limits: How much is taken on.
        api_key: What clients must send as bearer token; `None` asks for nothing.

    Attributes:
        batch: What all requests share.
        name: As above.
        limits: As above.

    Raises:
        TokenizerError: The model has no tokenizer.
    """

    def __init__(
        self, runtime: "Runtime", *, name: str | None, limits: ServeLimits, api_key: str | None
    ) -> None:
        report = runtime.report()
        if runtime.tokenizer is None:
            raise TokenizerError(
                f"{report.source} has no tokenizer, and the API speaks text. Give one: "
                "lmopt.Runtime(..., tokenizer=lmopt.Tokenizer.from_folder(folder))"
            )
        self.batch = SharedBatch(runtime, limits.max_queue)
        self.name = name or report.source.rstrip("/").rsplit("/", 1)[-1]
        self.limits = limits
        self._runtime = runtime
        self._tokenizer = runtime.tokenizer
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._spelling = Spelling(runtime.tokenizer)
        self._fingerprint = f"lmopt-{__version__}-{report.actual.backend}-{report.actual.dtype}"
        self._scoring = asyncio.Semaphore(1)
        self._scored = 0  # rows that are scored or wait for it

    def authorize(self, header: str | None) -> None:
        """Look at a request's `Authorization`.

        Raises:
            RefusedError: It is not the server's key.
        """
        if self._key is not None and not hmac.compare_digest((header or "").encode(), self._key):
            raise RefusedError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )

    def check_model(self, name: str | None) -> None:
        """See whether a request means this model.

        Raises:
            RefusedError: It means none, or another.
        """
        if name is None:
            raise RefusedError(
                f"model is missing; this server has {self.name!r}", param="model", code="missing"
            )
        if name != self.name:
            raise RefusedError(
                f"the model {name[:200]!r} does not exist here; this server has {self.name!r}",
                status=404,
                code="model_not_found",
                param="model",
            )

    async def accept(self, data: bytes, read: Read, form: type[Answer]) -> "Exchange":
        """Read a request and let it enter the batch.

        Args:
            data: Body of the request.
            read: Knows its fields.
            form: Of the answer.

        Raises:
            RefusedError: It cannot be honoured, or there is no room for it.
        """
        self.batch.check(1)
        body = Body.parse(data)
        self.check_model(body.text("model"))
        # Templates and tokenizers may take their time, which other requests should not feel.
        order = await asyncio.to_thread(read, body, self._runtime, self.limits)
        if order.rows > self.batch.most_rows:
            raise RefusedError(
                f"{len(order.prompts)} prompts with n={order.n} are {order.rows} rows; this server holds "
                f"{self.batch.most_rows} at most. Send them in several requests.",
                code="invalid_value",
                param="n",
            )
        param = "messages" if form is not Answer else "prompt"
        try:
            rows = order.make_rows(self._runtime)
        except Exception as error:
            raise refusal(error, param) from error
        scored = await self._score(order) if order.echo and order.logprobs else []
        submission = self.batch.submit(rows if order.new_tokens else [], streams=order.stream)
        answer = form(order=order, model=self.name, fingerprint=self._fingerprint, spelling=self._spelling)
        return Exchange(answer, submission, scored, self._tokenizer, rows)

    async def _score(self, order: Order) -> list[Scored]:
        """Score the prompts of a request, one request after the other, beside the batch."""
        if self._scored + len(order.prompts) > self.batch.most_rows:
            raise unavailable(
                f"{self._scored} prompts wait to be scored, which is as many as this server takes",
                code="overloaded",
                retry_after_s=1,
            )
        self._scored += len(order.prompts)
        try:
            async with self._scoring:
                scores, tops = await asyncio.to_thread(
                    score_with_top, self._runtime.engine, order.prompts, order.top
                )
        except Exception as error:
            raise refusal(error, "prompt") from error
        finally:
            self._scored -= len(order.prompts)
        parts = zip(order.prompts, scores, tops, strict=True)
        return [prompt_scored(ids, one.tolist(), top, self._tokenizer) for ids, one, top in parts]


class Exchange:
    """A request that is inside, and its answer.

    Args:
        answer: Form of the answer.
        submission: Its rows in the batch.
        scored: What the model thinks of its prompts; empty unless that was asked for.
        tokenizer: Of the model.
        rows: Its rows, whether they are run or not.
    """

    def __init__(
        self,
        answer: Answer,
        submission: Submission,
        scored: Sequence[Scored],
        tokenizer: Any,
        rows: Sequence[Any],
    ) -> None:
        order = answer.order
        self._answer = answer
        self._order = order
        self._submission = submission
        self._scored = scored
        self._before = [order.texts[index // order.n] if order.echo else "" for index in range(order.rows)]
        self._choices = [
            Choice(row, len(before), IncrementalText(tokenizer))
            for row, before in zip(rows, self._before, strict=True)
        ]

    @property
    def streams(self) -> bool:
        """Whether the client wants pieces."""
        return self._order.stream

    async def whole(self, gone: Callable[[], Awaitable[None]]) -> dict[str, Any]:
        """Wait for the rows and make the answer.

        Args:
            gone: Returns once the client has left.

        Raises:
            RefusedError: A row failed, or the server stops.
        """
        texts = list(self._before)
        watcher = asyncio.ensure_future(gone())
        watcher.add_done_callback(lambda _: self._submission.cancel())
        try:
            while pieces := await self._submission.next():
                for piece in pieces:
                    texts[piece.index] += piece.text
        finally:
            self._submission.cancel()
            left = watcher.done()
            watcher.cancel()
        for row in self._submission.rows:
            self._check(row, left=left)
        choices = []
        for index, choice in enumerate(self._choices):
            scored = None
            if self._order.logprobs:
                scored = choice.scored(len(choice.row.logprobs))
                if self._scored:
                    scored = together(self._scored[index // self._order.n], scored)
            finish = choice.row.finish_reason if self._order.new_tokens else "length"
            choices.append(self._answer.choice(index, texts[index], finish, scored))
        return self._answer.whole(choices, self._usage())

    def events(self) -> AsyncIterator[bytes]:
        """Give the answer in server-sent events while it grows; leaving early ends its rows."""
        events = self._events()
        # A client may leave before the first step of the generator, which then has nothing to clean up.
        weakref.finalize(events, self._submission.cancel).atexit = False
        return events

    async def _events(self) -> AsyncGenerator[bytes]:
        answer, submission = self._answer, self._submission
        try:
            openings = [answer.opening(index, text) for index, text in enumerate(self._before)]
            if any(openings):
                yield b"".join(answer.event([one]) for one in openings if one)
            if not self._order.new_tokens:
                yield b"".join(
                    answer.event([answer.delta(n, "", "length", None)]) for n in range(self._order.rows)
                )
            while pieces := await submission.next():
                for piece in pieces:
                    if piece.finish_reason is not None:
                        self._check(submission.rows[piece.index], left=False)
                yield b"".join(self._event(piece) for piece in pieces)
            last = answer.event([], self._usage()) if self._order.include_usage else b""
            yield last + DONE
        except RefusedError as error:
            # The status is sent already; clients know this form.
            yield sse(error.body)
        finally:
            submission.cancel()

    def _event(self, piece: Piece) -> bytes:
        scored = self._choices[piece.index].scored(piece.tokens) if self._order.logprobs else None
        return self._answer.event([self._answer.delta(piece.index, piece.text, piece.finish_reason, scored)])

    def _check(self, row: Any, *, left: bool) -> None:
        """Refuse a row that has no proper end."""
        if row.error is not None:
            raise refusal(row.error)
        if row.finish_reason == "cancelled":
            if left:
                raise RefusedError("the client has gone", status=_LEFT)
            raise unavailable("the server stops, and the time for running requests is over", code="stopping")

    def _usage(self) -> dict[str, int]:
        prompts = sum(choice.row.history.prompt_length for choice in self._choices[:: self._order.n])
        new = sum(choice.row.history.length - choice.row.history.prompt_length for choice in self._choices)
        return usage(prompts, new)
