"""`lmopt bench`: speed of engines, measured side by side."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmopt.cli.footprint import footprint
from lmopt.cli.opening import engines_for, formats_of, open_model, open_runtime
from lmopt.cli.options import Device, Dtype, Source, Threads, Trust
from lmopt.cli.output import Output, size
from lmopt.cli.tables import machine_line
from lmopt.errors import UnsupportedError
from lmopt.platform import machine

if TYPE_CHECKING:
    from lmopt.evaluation import Speed


def bench(
    out: Output,
    source: Source,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="Engine; repeatable, the first is the base of the ratios. Default: every ready one."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count; one more warms up.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 1,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory, each engine in a process of its own.")
    ] = True,
    trust: Trust = False,
) -> None:
    """Measure time to first token and tokens per second, with spread.

    Engines run in turn, round by round, so that a machine that slows down slows all of them. Figures are
    medians over rounds, with the least and the largest round.
    """
    from lmopt.artifact import is_artifact
    from lmopt.evaluation import compare_speed

    names = list(dict.fromkeys(backend or _ready(out, source, device)))
    common: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads, "trust": trust}
    with ExitStack() as stack:
        # A model is loaded once for all engines.
        shared = source if is_artifact(source) else open_model(out, source, dtype=dtype, trust=trust)
        runtimes = {
            name: stack.enter_context(open_runtime(out, shared, backend=name, **common)) for name in names
        }
        with out.progress() as tell:
            speeds = compare_speed(
                {name: one.engine for name, one in runtimes.items()},
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                rounds=rounds,
                batch=batch,
                progress=lambda done, total: tell("measure speed", done, total),
            )
        reports = {name: one.report().actual for name, one in runtimes.items()}
        del shared
    peaks: dict[str, dict[str, Any]] = {name: {} for name in names}
    if memory:
        with out.progress() as tell:
            for place, name in enumerate(names):
                tell("measure memory", place, len(names))
                peaks[name] = footprint(source, backend=name, **common)
    facts = machine()
    _show(out, speeds, peaks)
    out.text(
        f"{prompt_tokens} prompt tokens, {new_tokens} new tokens, batch {batch}, {rounds} rounds in turn; median "
        "(least .. largest round)."
        + (" Peak memory: a fresh process that opens SOURCE on this engine and generates." if memory else ""),
        style="dim",
    )
    out.text(machine_line(facts), style="dim")
    base = speeds[names[0]].decode_tokens_per_s.median
    out.result(
        {
            "machine": facts,
            "engines": {
                name: {
                    "speed": one,
                    "decode_ratio": one.decode_tokens_per_s.median / base,
                    "memory": peaks[name],
                    "report": reports[name],
                }
                for name, one in speeds.items()
            },
        }
    )


def _ready(out: Output, source: str, device: str) -> list[str]:
    """Names of the engines that can run the source; the others are named with their reason."""
    found = engines_for(formats_of(source), device)
    for name, problem in found.items():
        if problem:
            out.note(f"without {name}: {problem.splitlines()[0]}")
    names = [name for name, problem in found.items() if not problem]
    if not names:
        raise UnsupportedError(f"no engine that is ready can run {source} on {device}; see `lmopt doctor`")
    return names


def _show(out: Output, speeds: "dict[str, Speed]", peaks: dict[str, dict[str, Any]]) -> None:
    first = next(iter(speeds.values()))
    rows = [
        ("first token, ms", *(str(one.first_token_ms) for one in speeds.values())),
        ("prefill, tokens/s", *(str(one.prefill_tokens_per_s) for one in speeds.values())),
        ("decode, tokens/s", *(str(one.decode_tokens_per_s) for one in speeds.values())),
        ("new tokens/s in all", *(str(one.total_tokens_per_s) for one in speeds.values())),
        ("between tokens, ms: median", *(str(one.token_p50_ms) for one in speeds.values())),
        ("between tokens, ms: 95 %", *(str(one.token_p95_ms) for one in speeds.values())),
        ("decode against the first", *(f"{_ratio(one, first):.2f} x" for one in speeds.values())),
    ]
    if any(peaks.values()):
        rows.append(("peak memory", *(size(peaks[name].get("peak_bytes")) for name in speeds)))
    out.table(("", *speeds), rows)
    for name, peak in peaks.items():
        if "problem" in peak:
            out.warn(f"no memory figure of {name}: {peak['problem']}")


def _ratio(one: "Speed", first: "Speed") -> float:
    return one.decode_tokens_per_s.median / first.decode_tokens_per_s.median
