"""The report of a search: one HTML file that needs nothing else, and the picture beside it."""

import html
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmopt.tuning.limits import show
from lmopt.tuning.publishing import deployment
from lmopt.tuning.trials import Trial

if TYPE_CHECKING:
    from lmopt.tuning.result import TuneResult

_HEADER: Final = (
    "#", "deployment", "ms a token", "95 %", "tokens/s", "first token", "memory", "size", "perplexity", "KL",
)  # fmt: skip
_STATES: Final = {"screened": "put aside", "failed": "failed", "postponed": "no time left"}


def write_report(result: "TuneResult") -> Path:
    """Write `report.html`, `report.png` and `report.svg` into the output folder.

    Args:
        result: Of the search.

    Returns:
        The HTML file.
    """
    from lmopt.tuning.picture import write_picture
    from lmopt.tuning.result import REPORT, inline_svg

    png, svg = result.folder / "report.png", result.folder / "report.svg"
    write_picture(result, numbers(result), png, svg)
    path = result.folder / REPORT
    path.write_text(page(result, inline_svg(svg.read_text(encoding="utf-8"))), encoding="utf-8")
    return path


def numbers(result: "TuneResult") -> dict[str, int]:
    """Number the trials: measured ones first, the fastest before the others, then the rest in order."""
    measured = [one for one in result.trials if one.state == "measured"]
    measured.sort(key=lambda one: one.figures["token_p50_ms"] or float("inf"))
    rest = [one for one in result.trials if one.state != "measured"]
    return {one.name: place for place, one in enumerate([*measured, *rest], 1)}


def page(result: "TuneResult", picture: str) -> str:
    """Write the whole page.

    Args:
        result: Of the search.
        picture: SVG that goes into the page.
    """
    order = numbers(result)
    measured = sorted(
        (one for one in result.trials if one.state == "measured"), key=lambda one: order[one.name]
    )
    others = [one for one in result.trials if one.state != "measured"]
    title = f"lmopt tune: {result.label}"
    sections = [
        f"<h1>{_text(result.label)}</h1>",
        _headline(result),
        _section("Why", _list(result.reasons)),
        _section("The picture", f'<div class="picture">{picture}</div>'
                 '<p class="note">Numbers are those of the tables. Whiskers reach from the least to the largest start '
                 "or round.</p>"),
        _section("Nothing beats these", table(result, result.pareto)) if result.pareto else "",
        _section(f"Measured: {len(measured)}", table(result, measured)),
        _section(f"Not measured: {len(others)}", _rest(result, others)) if others else "",
        _section("Use it, make it again", _commands(result)),
        _section("How this was measured", _circumstances(result)),
    ]  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{style()}</head>'
        f'<body class="lmopt-tune"><main>{"".join(sections)}</main></body></html>\n'
    )


def table(result: "TuneResult", trials: Sequence[Trial]) -> str:
    """Write measured trials as a table; the recommended one is marked."""
    order = numbers(result)
    rows = []
    for one in trials:
        figures, loss = one.figures, one.loss or {}
        broken = result.constraints.broken(figures)
        best = result.best is not None and one.name == result.best.name
        error = loss.get("perplexity_ratio_stderr")
        ratio = "-" if not loss else f"x {loss['perplexity_ratio']:.4f} ± {error:.4f}"
        rate = "-" if one.decode_tokens_per_s is None else f"{one.decode_tokens_per_s.median:.1f}"
        notes = [*broken, *([one.reason] if one.reason else [])]
        under = f'<div class="{"bad" if broken else "note"}">{_text("; ".join(notes))}</div>' if notes else ""
        mark = '<span class="mark">recommended</span>' if best else ""
        spread = one.token_p50_ms
        took = "-" if spread is None else f"{spread.median:.3g}"
        hint = (
            ""
            if spread is None
            else f' title="{spread.least:.3g} .. {spread.most:.3g} ms, {one.starts} starts"'
        )
        cells = [
            f"<td>{order[one.name]}</td>",
            f'<td class="name">{_text(one.name)} {mark}{under}</td>',
            f"<td{hint}><b>{took}</b></td>",
            *(
                f"<td>{_text(cell)}</td>"
                for cell in (
                    show("token_p95_ms", figures["token_p95_ms"]).removesuffix(" ms"),
                    rate,
                    show("first_token_ms", figures["first_token_ms"]),
                    show("peak_memory_bytes", figures["peak_memory_bytes"]),
                    show("artifact_bytes", figures["artifact_bytes"]),
                    ratio,
                    "-" if not loss else f"{loss['kl_mean']:.3g}",
                )
            ),
        ]
        kind = "best" if best else "breaks" if broken else ""
        rows.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    head = "".join(f"<th>{_text(name)}</th>" for name in _HEADER)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _headline(result: "TuneResult") -> str:
    best, base = result.best, result.float_model
    if best is None:
        return '<p class="lead bad">No deployment keeps every limit. Nothing was published.</p>'
    figures = best.figures
    cards = []
    if best.decode_tokens_per_s is not None:
        cards.append((f"{best.decode_tokens_per_s.median:.0f}", "tokens a second"))
    if base is not None and base is not best:
        speed, size = (
            (base.figures[name] or 0.0) / (figures[name] or 1.0)
            for name in ("token_p50_ms", "artifact_bytes")
        )
        cards += [(f"{speed:.1f}x", "faster than the float model as it is"), (f"{size:.1f}x", "smaller")]
    cards.append((show("artifact_bytes", figures["artifact_bytes"]), "of files"))
    cards.append((show("peak_memory_bytes", figures["peak_memory_bytes"]), "peak memory"))
    if figures["perplexity_ratio"] is not None:
        cards.append((f"x {figures['perplexity_ratio']:.3f}", "perplexity of the float model"))
    shown = "".join(f"<div><b>{_text(value)}</b><span>{_text(what)}</span></div>" for value, what in cards)
    return f'<p class="lead">{_text(best.name)}</p><div class="cards">{shown}</div>'


def _rest(result: "TuneResult", trials: Iterable[Trial]) -> str:
    order = numbers(result)
    rows = "".join(
        f'<tr><td>{order[one.name]}</td><td class="name">{_text(one.name)}</td>'
        f'<td class="left {"bad" if one.state == "failed" else ""}">{_STATES[one.state]}</td>'
        f'<td class="left reason">{_text(one.reason)}</td></tr>'
        for one in sorted(trials, key=lambda one: order[one.name])
    )
    head = "<th>#</th><th>deployment</th><th>what</th><th>why</th>"
    return f'<div class="wide"><table class="words"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _commands(result: "TuneResult") -> str:
    if result.best is None or result.artifact is None:
        return "<p>There is nothing to run. Loosen a limit, or give more time: the same command goes on.</p>"
    best = result.best
    options = "".join(f", {name}={value!r}" for name, value in deployment(best).items())
    code = "\n".join(
        [
            "import lmopt",
            f"runtime = lmopt.Runtime({str(result.artifact)!r}{options})",
            'print(runtime.generate("The capital of France is", max_new_tokens=32))',
        ]
    )
    replay = f"lmopt tune {shlex.quote(result.source)} --replay {shlex.quote(str(result.folder))} --output NEW-FOLDER"
    recipe = json.dumps({"lmopt_recipe": 1, "steps": [dict(one) for one in best.steps]}, indent=2)
    shown = (
        f"<p>The recipe, as a file for <code>lmopt compress --recipe</code>:</p><pre>{_text(recipe)}</pre>"
    )
    return (
        f"<pre>{_text(code)}</pre><p>Compress, export and measure it again, here or on another machine:</p>"
        f"<pre>{_text(replay)}</pre>{shown if best.steps else '<p>Nothing is compressed.</p>'}"
    )


def _circumstances(result: "TuneResult") -> str:
    machine, work = result.machine, result.workload
    memory = machine.get("memory_bytes")
    facts: list[tuple[str, Any]] = [
        ("Machine", f"{machine['cpu']}, {machine['usable_cpus']} of {machine['cores']} cores, "
         f"{memory / 1e9:.0f} GB memory, {machine['os']}" if memory else machine["cpu"]),
        ("Instruction sets", ", ".join(machine["instruction_sets"]) or "unknown"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in result.versions.items())),
        ("Request", f"{work.prompt_tokens} prompt tokens, {work.new_tokens} new tokens, batch 1"),
        ("Rounds", f"{work.rounds} and one to warm up, in a process of its own; the best in {work.starts} processes"),
        ("Quality", f"{work.score_tokens} tokens of {result.texts.get('quality', '-')}, on the engine itself, against "
         f"the float model ({result.dtype}, eager)"),
        ("Calibration", result.texts.get("calibration", "none")),
        ("Limits", ", ".join(f"{name} <= {value:g}" for name, value in result.constraints.given().items())),
        ("Objectives", ", ".join(result.objectives)),
        ("Without", "; ".join(f"{name}: {why}" for name, why in result.without.items()) or "no engine was left out"),
        ("Time", f"{result.seconds:.0f} s in this call; "
         + ("nothing was left to try" if result.finished else "the same command goes on from here")),
    ]  # fmt: skip
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(what)}</td></tr>" for name, what in facts)
    return f'<table class="facts">{rows}</table>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(one)}</li>" for one in sentences) + "</ul>"


def _text(words: object) -> str:
    return html.escape(str(words))


def style() -> str:
    """The page's style; every rule stays inside of `.lmopt-tune`, so that it can stand in a notebook."""
    return f"<style>{_STYLE}</style>"


_STYLE: Final = """
.lmopt-tune{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;color:#2b303a;
background:#fff;margin:0}
.lmopt-tune main{max-width:1180px;margin:0 auto;padding:32px 28px 64px}
.lmopt-tune h1{font-size:30px;margin:0 0 4px;letter-spacing:-.01em}
.lmopt-tune h2{font-size:19px;margin:36px 0 10px;padding-bottom:5px;border-bottom:1px solid #e3e7ec}
.lmopt-tune .lead{font-size:18px;margin:0 0 18px;color:#4a5261}
.lmopt-tune .cards{display:flex;flex-wrap:wrap;gap:12px}
.lmopt-tune .cards div{flex:1 1 130px;background:#f5f7fa;border-radius:10px;padding:12px 16px}
.lmopt-tune .cards b{display:block;font-size:24px;line-height:1.25;color:#1f4f88;white-space:nowrap}
.lmopt-tune .cards span{font-size:13px;color:#626b7a}
.lmopt-tune ul{padding-left:20px;margin:8px 0}
.lmopt-tune li{margin:4px 0}
.lmopt-tune .picture svg{width:100%;height:auto;max-width:1120px}
.lmopt-tune .wide{overflow-x:auto}
.lmopt-tune table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
.lmopt-tune th{font-weight:600;text-align:right;color:#626b7a;padding:6px 9px;border-bottom:1px solid #cfd5dd;
white-space:nowrap;vertical-align:bottom}
.lmopt-tune td{text-align:right;padding:6px 9px;border-bottom:1px solid #eef1f4;vertical-align:top;white-space:nowrap}
.lmopt-tune td.name,.lmopt-tune th:nth-child(2),.lmopt-tune td.left,.lmopt-tune table.words th{text-align:left}
.lmopt-tune td.name{white-space:normal;min-width:250px}
.lmopt-tune td.reason{white-space:normal;overflow-wrap:anywhere}
.lmopt-tune tr.best td{background:#fff5e9}
.lmopt-tune tr.breaks td{color:#8a93a1}
.lmopt-tune .mark{background:#d9822b;color:#fff;border-radius:9px;padding:1px 8px;font-size:12px;white-space:nowrap}
.lmopt-tune .note{font-size:12.5px;color:#727b89}
.lmopt-tune .bad,.lmopt-tune td.bad{color:#b3402e}
.lmopt-tune div.bad{font-size:12.5px}
.lmopt-tune pre{background:#f5f7fa;border-radius:8px;padding:12px 16px;overflow-x:auto;font-size:13px;margin:8px 0}
.lmopt-tune table.facts th{text-align:left;vertical-align:top;width:140px}
.lmopt-tune table.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
"""
