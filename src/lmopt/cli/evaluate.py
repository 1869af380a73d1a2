"""`lmopt eval`: perplexity of a text, tasks, exposure of secrets, and translations and transcripts."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lmopt.cli.canaries import exposures
from lmopt.cli.opening import open_runtime
from lmopt.cli.options import Backend, Device, Dtype, Source, Threads, Trust
from lmopt.cli.output import Output
from lmopt.cli.references import judged, pairs_to_judge
from lmopt.cli.tasks import scores


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
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness to measure instead, separated by commas: names, patterns "
            "with *, or .yaml files.",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='Translations or transcripts to hold the model against instead: lines of {"source": TEXT, "text": '
            '"..."} or {"audio": PATH, "text": "..."}.',
            show_default=False,
        ),
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Of pairs: beams of beam search.")] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of tasks: use only so many items of each.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Of tasks: solved examples in front of each item.")
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder with task files of your own; they may run code."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Of tasks: write items by the chat template.")] = False,
    allow_network: Annotated[
        bool, typer.Option("--allow-network", help="Of tasks: fetch data that are not on this machine.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Of tasks: most rows in one call.")] = 8,
    tokens: Annotated[int | None, typer.Option(min=2, help="Use only so many tokens from the start.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Tokens from one window to the next.")] = 512,
    backend: Backend = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    trust: Trust = False,
) -> None:
    """Measure how good a model is: perplexity, scores on tasks, exposure of secrets, or errors of what it writes."""
    if sum(one is not None for one in (text, canaries, tasks, pairs)) != 1:
        raise typer.BadParameter("give one of a text, canaries, tasks and pairs", param_hint="--text")
    engine = {"backend": backend, "device": device, "dtype": dtype, "threads": threads, "trust": trust}
    if canaries is not None:
        with open_runtime(out, source, **engine) as runtime:
            exposures(out, runtime, canaries)
        return
    if pairs is not None:
        given = pairs_to_judge(pairs)
        with open_runtime(out, source, **engine) as runtime:
            judgements = judged(out, {"value": runtime}, given, num_beams=num_beams)
            out.result({"pairs": pairs, **asdict(judgements["value"]), "engine": runtime.report().actual})
        return
    if tasks is not None:
        with open_runtime(out, source, **engine) as runtime:
            scores(
                out,
                runtime,
                tasks,
                limit=limit,
                num_fewshot=num_fewshot,
                include_path=include_path,
                chat=chat,
                allow_network=allow_network,
                batch_size=batch_size,
                trust=trust,
            )
        return
    assert text is not None
    words = text.read_text(encoding="utf-8")
    with open_runtime(out, source, **engine) as runtime:
        with out.progress() as tell:
            found = runtime.perplexity(
                words,
                tokens=tokens,
                context=context,
                stride=stride,
                progress=lambda done, total: tell("perplexity", done, total),
            )
        actual = runtime.report().actual
    out.text(
        f"perplexity {found.value:.3f} +- {found.stderr:.3f} ({found.tokens_scored:,} of {found.tokens:,} tokens "
        f"scored, context {found.context}, stride {found.stride}) on {actual.backend} {actual.device} {actual.dtype}"
    )
    out.result({"perplexity": found, "text": text, "engine": actual})
