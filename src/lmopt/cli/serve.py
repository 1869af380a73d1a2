"""`lmopt serve`: a model behind HTTP, by OpenAI's protocol."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from lmopt.cli.opening import open_runtime
from lmopt.cli.options import Backend, Device, Dtype, Source, Threads, Trust, assignments
from lmopt.cli.output import Output

KEY: Final = "LMOPT_API_KEY"
_LOCAL: Final = ("127.0.0.1", "localhost", "::1")


def serve(
    out: Output,
    source: Source,
    host: Annotated[
        str, typer.Option(help="Interface to listen at; only this machine's own programs reach the default.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model for clients; default: that of its folder.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help=f"File with the key that clients must send; or set {KEY}. Default: none is asked for."
        ),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Rows that are decoded at once.")] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Rows that may wait; one more is refused.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a row.")] = 4096,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 1 << 20,
    stop_timeout_s: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have once the server is stopped.")
    ] = 30.0,
    runtime_set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other option of the runtime or engine; repeatable."),
    ] = None,
    backend: Backend = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    trust: Trust = False,
) -> None:
    """Serve a model over HTTP by OpenAI's protocol; requests of all clients share one batch.

    Answers GET /v1/models, POST /v1/completions and /v1/chat/completions, GET /health and /metrics.
    Ctrl-C or SIGTERM stops it: running requests finish, new ones are refused.
    """
    from lmopt.serving import ServeLimits
    from lmopt.serving.app import require
    from lmopt.serving.server import bind
    from lmopt.serving.server import serve as run

    require("uvicorn")
    limits = ServeLimits(
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_body_bytes=max_body_bytes,
        stop_timeout_s=stop_timeout_s,
    )
    key = _key(api_key_file)
    if key is None and host not in _LOCAL:
        out.warn(f"everybody who reaches {host} may use this server: no key is asked for (--api-key-file)")
    with bind(host, port) as at:
        taken = at.getsockname()[1]
        with open_runtime(
            out,
            source,
            backend=backend,
            device=device,
            dtype=dtype,
            threads=threads,
            trust=trust,
            max_num_seqs=max_num_seqs,
            **assignments(runtime_set, "--runtime-set"),
        ) as runtime:
            address = f"http://{f'[{host}]' if ':' in host else host}:{taken}/v1"

            def ready() -> None:
                out.note(f"listening at {address}; Ctrl-C stops")
                out.result({"address": address, "engine": runtime.report().actual})

            run(runtime, at=at, name=name, limits=limits, api_key=key, ready=ready)
    out.note("stopped")


def _key(file: Path | None) -> str | None:
    """Read the key; it never stands on the command line, which other users of the machine can see."""
    if file is None:
        return os.environ.get(KEY) or None
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot be read: {error}", param_hint="--api-key-file") from error
    if not text:
        raise typer.BadParameter(f"{file} is empty", param_hint="--api-key-file")
    return text
