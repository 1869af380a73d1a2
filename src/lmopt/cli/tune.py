"""`lmopt tune`: search for the best deployment of a model on this machine, or make a found one again."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lmopt.cli.options import Device, Source, Trust
from lmopt.cli.output import Output, size

if TYPE_CHECKING:
    from lmopt.tuning import TuneResult

_UNITS: Final = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_SHOWN: Final = 12


def tune(
    out: Output,
    source: Source,
    output: Annotated[
        Path,
        typer.Option(help="Folder for model/, report.html, report.png, report.svg, tune.json and study/."),
    ] = Path("lmopt-tune"),
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text that quality is measured on; the second half of a long one calibrates. Default: "
            "Python's own reference.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text that calibrated recipes read; not --text.",
            show_default=False,
        ),
    ] = None,
    max_token_ms: Annotated[
        float | None, typer.Option(help="Limit of the median time of a token.", show_default=False)
    ] = None,
    max_token_p95_ms: Annotated[
        float | None, typer.Option(help="Limit of its 95th percentile.", show_default=False)
    ] = None,
    max_first_token_ms: Annotated[
        float | None, typer.Option(help="Limit of the time to the first token.", show_default=False)
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Limit of peak memory, such as 500MB.", show_default=False)
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="Limit of the size of all files, such as 100MB.", show_default=False)
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(help="Limit of perplexity over the float model's; default: 1.05.", show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Limit of the mean KL divergence, in nats.", show_default=False)
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="latency, size, quality, memory, first_token; repeatable, the first counts most. "
            "Default: latency, size, quality.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[float, typer.Option(min=1.0, help="Seconds for this call.")] = 1800.0,
    recipe: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, help="Recipe file to try first; repeatable.", show_default=False
        ),
    ] = None,
    only_recipes: Annotated[
        bool, typer.Option("--only-recipes", help="Try no recipes but those of --recipe.")
    ] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Engine; repeatable. Default: every ready one.", show_default=False),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Threads; repeatable. Default: all CPUs and half of them.", show_default=False
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    score_tokens: Annotated[
        int, typer.Option(min=64, help="Tokens of text that quality is measured on.")
    ] = 2048,
    trial_seconds: Annotated[float, typer.Option(min=1.0, help="Most seconds of one piece of work.")] = 900.0,
    trial_memory: Annotated[
        str | None,
        typer.Option(help="Most memory of one; default: 90 % of what is free.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    replay: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="tune.json or output folder of a search: make its recommendation again into --output, and measure it.",
            show_default=False,
        ),
    ] = None,
    device: Device = "cpu",
    trust: Trust = False,
) -> None:
    """Search for the best deployment of a model on this machine, under limits.

    Engines, dialects, precisions, compression recipes and threads are tried, each in a process of its own. After
    Ctrl-C, or with more budget, the same command goes on. The exit status is 1 where nothing keeps the limits, or a
    replayed deployment is more than 10 % slower than it was.
    """
    from lmopt.tuning import Workload
    from lmopt.tuning import tune as search

    if replay is not None:
        _replay(out, replay, source, output, trust)
        return
    limits = {
        "token_p50_ms": max_token_ms,
        "token_p95_ms": max_token_p95_ms,
        "first_token_ms": max_first_token_ms,
        "peak_memory_bytes": as_bytes(max_memory, "--max-memory"),
        "artifact_bytes": as_bytes(max_size, "--max-size"),
        "perplexity_ratio": max_perplexity_ratio,
        "kl_mean": max_kl,
    }
    if text is None:
        out.warn(
            "no --text: quality is measured on Python's own reference. Give text of the kind that the model will meet."
        )
    try:
        with out.progress() as tell:
            found = search(
                source,
                output=output,
                text=text,
                calibration=calibration,
                constraints=limits,
                objectives=tuple(objective or ("latency", "size", "quality")),
                budget=budget,
                recipes=recipe,
                only_recipes=only_recipes,
                backends=backend,
                threads=threads,
                device=device,
                trust=trust,
                workload=Workload(
                    prompt_tokens=prompt_tokens, new_tokens=new_tokens, score_tokens=score_tokens
                ),
                trial_seconds=trial_seconds,
                memory_bytes=as_bytes(trial_memory, "--trial-memory"),
                seed=seed,
                progress=tell,
            )
    except KeyboardInterrupt:
        out.note(f"What is known so far is in {output}; the same command goes on from there.")
        raise
    out.ok = found.best is not None
    _show(out, found)
    out.result(found.to_dict())


def as_bytes(words: str | None, option: str) -> int | None:
    """Read a size such as `500MB`, `1.5 GB` or `300000`.

    >>> as_bytes("1.5 GB", "--max-size")
    1500000000

    Raises:
        typer.BadParameter: It is no size.
    """
    if words is None:
        return None
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", words)
    unit = None if match is None else _UNITS.get(match[2].upper())
    if match is None or unit is None:
        raise typer.BadParameter(
            f"{words!r} is no size; expected one such as 500MB or 1.5GB", param_hint=option
        )
    return int(float(match[1]) * unit)


def _show(out: Output, found: "TuneResult") -> None:
    from lmopt.tuning.limits import show

    measured = [one for one in found.trials if one.state == "measured"]
    measured.sort(key=lambda one: one.figures["token_p50_ms"] or float("inf"))
    rows = []
    for one in measured[:_SHOWN]:
        best = found.best is not None and one.name == found.best.name
        broken = found.constraints.broken(one.figures)
        rows.append(
            [
                ("* " if best else "  ") + one.name,
                str(one.token_p50_ms),
                show("first_token_ms", one.figures["first_token_ms"]),
                size(one.peak_memory_bytes),
                size(one.artifact_bytes),
                show("perplexity_ratio", one.figures["perplexity_ratio"]),
                "yes" if not broken else "no",
            ]
        )
    out.table(
        ["deployment", "ms a token", "first token", "memory", "size", "perplexity ratio", "keeps the limits"],
        rows,
        title=f"{found.label}: {len(measured)} of {len(found.trials)} deployments measured"
        + (f", the fastest {_SHOWN} shown" if len(measured) > _SHOWN else ""),
    )
    if found.best is None:
        out.text("No deployment keeps every limit.", style="bold red")
    else:
        out.text(f"Recommended: {found.best.name}", style="bold")
    for reason in found.reasons:
        out.text(f"- {reason}")
    out.text(f"Report: {found.folder / 'report.html'}", style="dim")
    if found.best is not None:
        out.note(
            f'Next: lmopt run {found.artifact} --backend {found.best.backend} "The capital of France is"'
        )


def _replay(out: Output, result: Path, source: str, folder: Path, trust: bool) -> None:
    from lmopt.tuning import replay
    from lmopt.tuning.limits import LABELS, show

    with out.progress() as tell:
        found = replay(result, folder, source=source, trust=trust, progress=tell)
    names = (
        "token_p50_ms",
        "token_p95_ms",
        "first_token_ms",
        "peak_memory_bytes",
        "artifact_bytes",
        "perplexity_ratio",
    )
    out.table(
        [found.trial.name, "then", "now"],
        [[LABELS[name][0], show(name, found.predicted.figures[name]), show(name, found.trial.figures[name])]
         for name in names],
    )  # fmt: skip
    out.text(f"{found.artifact}: a token takes {found.deviation:+.1%}")
    if not found.same_machine:
        out.warn("This is another kind of machine than that of the search: its times need not hold here.")
    out.ok = found.holds or not found.same_machine
    values: dict[str, Any] = {
        "artifact": found.artifact,
        "trial": found.trial.to_dict(),
        "predicted": found.predicted.to_dict(),
        "deviation": found.deviation,
        "holds": found.holds,
        "same_machine": found.same_machine,
    }
    out.result(values)
