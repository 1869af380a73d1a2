"""The ASGI application: routes, headers and bodies; the same for uvicorn, Ray Serve or any other server."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any, Final

from lmopt.errors import NotInstalledError
from lmopt.registry import pip_line
from lmopt.serving.answers import Answer, ChatAnswer
from lmopt.serving.limits import ServeLimits
from lmopt.serving.orders import read_chat, read_completion
from lmopt.serving.refusals import RefusedError, refusal
from lmopt.serving.service import Read, Service
from lmopt.spec import Requirement

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from starlette.responses import Response

    from lmopt.runtime import Runtime

_logger = logging.getLogger(__name__)
# FastAPI can send traces to a collector that the environment names; a model server must not.
_NO_TELEMETRY: Final[Any] = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
_JOIN_S: Final = 10.0


def create_app(
    runtime: "Runtime",
    *,
    name: str | None = None,
    limits: ServeLimits | None = None,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
) -> "FastAPI":
    """Make the application that serves a model.

    Its thread starts and ends with the application (ASGI's lifespan). `app.state.service` is the
    `lmopt.serving.service.Service` behind it.

    Args:
        runtime: Open runtime of a model with a tokenizer; stays the caller's to close, after the application.
        name: Name of the model for clients; `None` takes that of its folder.
        limits: How much is taken on; `ServeLimits()` where `None`.
        api_key: What clients must send as bearer token; `None` asks for nothing.
        hosts: Names by which clients may call the server (`Host`); `None` takes any. A server of this machine that
            asks for no key needs it: a web page can make its own name point here.

    Raises:
        NotInstalledError: FastAPI is missing.
        TokenizerError: The model has no tokenizer.
    """
    require("fastapi")
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
    from starlette.exceptions import HTTPException

    service = Service(runtime, name=name, limits=limits or ServeLimits(), api_key=api_key)
    batch = service.batch
    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "lmopt"}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batch.start()
        try:
            yield
        finally:
            batch.abort()
            batch.join(_JOIN_S)  # all requests are over: nobody waits for this event loop

    app = FastAPI(
        title="lmopt",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        telemetry=_NO_TELEMETRY,
    )
    app.state.service = service

    def refused(error: BaseException) -> "Response":
        said = refusal(error)
        if said.status == 500:
            _logger.error("a request failed", exc_info=error)
        return JSONResponse(said.body, said.status, said.headers)

    def guarded(
        handler: Callable[[Request], Awaitable["Response"]],
    ) -> Callable[[Request], Awaitable["Response"]]:
        async def endpoint(request: Request) -> "Response":
            try:
                _check_host(request, hosts)
                service.authorize(request.headers.get("authorization"))
                response = await handler(request)
            except Exception as error:
                response = refused(error)
            batch.metrics.answers[response.status_code] += 1
            return response

        return endpoint

    def generating(read: Read, form: type[Answer]) -> Callable[[Request], Awaitable["Response"]]:
        async def endpoint(request: Request) -> "Response":
            exchange = await service.accept(await _body(request, service.limits), read, form)
            if exchange.streams:
                return StreamingResponse(
                    exchange.events(), media_type="text/event-stream", headers={"cache-control": "no-cache"}
                )

            async def gone() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass

            return JSONResponse(await exchange.whole(gone))

        return guarded(endpoint)

    async def models(request: Request) -> "Response":
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> "Response":
        service.check_model(request.path_params["name"])
        return JSONResponse(model)

    async def metrics(request: Request) -> "Response":
        return PlainTextResponse(batch.metrics.text(batch.rows))

    async def health(request: Request) -> "Response":
        problem = batch.problem
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    app.add_route("/v1/completions", generating(read_completion, Answer), ["POST"])
    app.add_route("/v1/chat/completions", generating(read_chat, ChatAnswer), ["POST"])
    app.add_route("/v1/models", guarded(models), ["GET"])
    app.add_route("/v1/models/{name:path}", guarded(one_model), ["GET"])
    app.add_route("/metrics", guarded(metrics), ["GET"])
    app.add_route("/health", health, ["GET"])

    async def no_route(request: Request, error: Exception) -> "Response":
        status = error.status_code if isinstance(error, HTTPException) else 500
        said = {404: "there is nothing at", 405: "this method is not possible at"}.get(
            status, "the server failed at"
        )
        return refused(RefusedError(f"{said} {request.url.path[:200]}", status=status, code="not_found"))

    app.add_exception_handler(HTTPException, no_route)
    return app


def require(module: str) -> None:
    """See that a package of the extra `serve` is there.

    Raises:
        NotInstalledError: It is not.
    """
    if not Requirement(module, "").is_met():
        extra = pip_line('"lmopt[serve]"')
        raise NotInstalledError(f"serving a model needs {module}, which this Python lacks: {extra}")


def _check_host(request: "Request", hosts: Collection[str] | None) -> None:
    """See whether the server was called by a name that it has."""
    name = request.url.hostname
    if hosts is not None and name not in hosts:
        raise RefusedError(
            f"this server is not called {str(name)[:100]!r} but {', '.join(sorted(hosts))}. To reach it "
            "by other names, through a proxy say, give it a key",
            status=403,
            code="wrong_host",
        )


async def _body(request: "Request", limits: ServeLimits) -> bytes:
    """Read the body of a request, no more of it than allowed.

    Raises:
        RefusedError: It is too large, too slow, or no JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps out what a web page could send to this machine without being asked.
        raise RefusedError(f"the content type must be application/json, not {kind[:100]!r}", status=415)
    too_large = RefusedError(
        f"the body is larger than {limits.max_body_bytes} bytes", status=413, code="request_too_large"
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limits.max_body_bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                data += part
                if len(data) > limits.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise RefusedError(
            f"the body did not arrive within {limits.body_timeout_s:g} s", status=408, code="timeout"
        ) from None
    return bytes(data)
