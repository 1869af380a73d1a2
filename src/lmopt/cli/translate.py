"""`lmopt translate`: what an encoder-decoder makes of each line."""

import sys
import time
from typing import Annotated, Any

import typer

from lmopt.cli.opening import open_runtime
from lmopt.cli.options import Backend, Device, Dtype, Source, Threads, Trust, assignments
from lmopt.cli.output import Output


def translate(
    out: Output,
    source: Source,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="Texts; lines of stdin where none is given.", show_default=False
        ),
    ] = None,
    backend: Backend = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of beam search; 1 is off.")] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field of GenerationConfig; repeatable."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Translate texts, or whatever else the model was trained to make of them; one line each to stdout."""
    given = texts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    options = assignments(set_) | ({"num_beams": num_beams} if num_beams > 1 else {})
    with open_runtime(
        out, source, backend=backend, device=device, dtype=dtype, threads=threads, trust=trust
    ) as runtime:
        began = time.perf_counter()
        found = runtime.translate(given, **options)
        seconds = time.perf_counter() - began
        engine = runtime.report().actual
    show(out, {"texts": found, "seconds": seconds, "engine": engine})


def show(out: Output, result: dict[str, Any]) -> None:
    """Write the texts, and say how long they took on what."""
    for text in result["texts"]:
        out.raw(f"{text}\n")
    engine = result["engine"]
    out.note(
        f"{len(result['texts'])} texts in {result['seconds']:.1f} s on {engine.backend} {engine.device} {engine.dtype}"
    )
    out.result(result)
