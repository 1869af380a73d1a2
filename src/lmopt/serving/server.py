"""Run the application under uvicorn, and stop it well."""

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from lmopt.errors import UnsupportedOptionError
from lmopt.serving.app import create_app, require
from lmopt.serving.limits import ServeLimits

if TYPE_CHECKING:
    from lmopt.runtime import Runtime

_BACKLOG: Final = 2048
_LOCAL: Final = ("127.0.0.1", "::1", "localhost")
_GRACE_S: Final = 5.0
"""Seconds in which a connection has to take the last words of its answer."""


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address; nobody is let in yet.

    Args:
        host: Name or number of an interface of this machine.
        port: Its port; 0 takes a free one.

    Raises:
        UnsupportedOptionError: It cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        raise UnsupportedOptionError(
            f"host={host!r}, port={port}: cannot be listened at ({error}). Choose another, or port=0 for a free one."
        ) from error
    return bound


def serve(
    runtime: "Runtime",
    *,
    at: socket.socket,
    name: str | None = None,
    limits: ServeLimits | None = None,
    api_key: str | None = None,
    ready: Callable[[], object] = lambda: None,
) -> None:
    """Serve a model until SIGTERM or SIGINT, then let running requests finish.

    New connections are refused from then on. Requests that still run after `limits.stop_timeout_s` are ended with
    an error that says so.

    Args:
        runtime: Open runtime of a model with a tokenizer; stays the caller's to close.
        at: From `bind`; closed at the end.
        name: As for `create_app`.
        limits: As for `create_app`.
        api_key: As for `create_app`.
        ready: Called once clients are let in.

    Raises:
        NotInstalledError: FastAPI or uvicorn is missing.
        TokenizerError: The model has no tokenizer.
    """
    require("uvicorn")
    import uvicorn

    limits = limits or ServeLimits()
    local = api_key is None and ipaddress.ip_address(at.getsockname()[0].partition("%")[0]).is_loopback
    app = create_app(runtime, name=name, limits=limits, api_key=api_key, hosts=_LOCAL if local else None)
    batch, patience_s = app.state.service.batch, limits.stop_timeout_s

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            batch.stop()
            asyncio.get_running_loop().call_later(patience_s, batch.abort)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(patience_s + _GRACE_S),
    )
    # uvicorn raises the signal again when it is done; here that is the proper end and no death.
    before: dict[int, Any] = {
        one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        with at:
            Server(config).run(sockets=[at])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
