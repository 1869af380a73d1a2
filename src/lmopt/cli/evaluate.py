"""`lmopt eval`: perplexity of a text, and exposure of secrets."""

from pathlib import Path
from typing import Annotated

import typer

from lmopt.cli.canaries import exposures
from lmopt.cli.opening import open_runtime
from lmopt.cli.options import Backend, Device, Dtype, Source, Threads, Trust
from lmopt.cli.output import Output


def evaluate(
    out: Output,
    source: Source,
    text: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text file, UTF-8.", show_default=False)
    ] = None,
    canaries: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='Secrets to look for instead: lines of {"template": "my code is {}", "secret": "1234"}.',
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Use only so many tokens from the start.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Tokens from one window to the next.")] = 512,
    backend: Backend = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    trust: Trust = False,
) -> None:
    """Measure perplexity: how well a model predicts a text, with its standard error; or exposure: memorised secrets."""
    if (text is None) == (canaries is None):
        raise typer.BadParameter("give a text, or canaries", param_hint="--text")
    if canaries is not None:
        with open_runtime(
            out, source, backend=backend, device=device, dtype=dtype, threads=threads, trust=trust
        ) as runtime:
            exposures(out, runtime, canaries)
        return
    assert text is not None
    words = text.read_text(encoding="utf-8")
    with open_runtime(
        out, source, backend=backend, device=device, dtype=dtype, threads=threads, trust=trust
    ) as runtime:
        with out.progress() as tell:
            found = runtime.perplexity(
                words,
                tokens=tokens,
                context=context,
                stride=stride,
                progress=lambda done, total: tell("perplexity", done, total),
            )
        engine = runtime.report().actual
    out.text(
        f"perplexity {found.value:.3f} +- {found.stderr:.3f} ({found.tokens_scored:,} of {found.tokens:,} tokens "
        f"scored, context {found.context}, stride {found.stride}) on {engine.backend} {engine.device} {engine.dtype}"
    )
    out.result({"perplexity": found, "text": text, "engine": engine})
