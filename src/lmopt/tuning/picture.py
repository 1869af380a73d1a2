"""The picture of a search: latency against size, and latency against quality."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmopt.tuning.trials import Trial

if TYPE_CHECKING:
    from lmopt.tuning.result import TuneResult

KEEPS: Final = "#2a6fbb"
BREAKS: Final = "#c9ced6"
FLOAT: Final = "#333a45"
BEST: Final = "#d9822b"
_INK: Final = "#2b303a"
_FAINT: Final = "#8a93a1"
_MOST_LABELS: Final = 12


def draw(result: "TuneResult", numbers: dict[str, int]) -> Any:
    """Draw what was measured.

    Args:
        result: Of the search.
        numbers: Name of a trial to its number in the tables.

    Returns:
        A matplotlib figure, drawn without a display.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9.5, "font.family": "sans-serif", "text.color": _INK}):
        figure = Figure(figsize=(11.0, 4.9), layout="constrained", dpi=150)
        left, right = figure.subplots(1, 2)
        shown = [one for one in result.trials if one.state == "measured" and one.figures["token_p50_ms"]]
        front = [one for one in result.pareto if one in shown]
        for panel in (left, right):
            panel.set_xscale("log")
            panel.set_xlabel("time of a token, ms (left is faster)")
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(visible=True, which="major", color="#e8ebef", linewidth=0.8)
            panel.set_axisbelow(True)
        left.set_yscale("log")
        left.set_title("Latency and size", loc="left", fontweight="bold", fontsize=11)
        left.set_ylabel("size of the files, MB (lower is smaller)")
        right.set_title("Latency and quality", loc="left", fontweight="bold", fontsize=11)
        right.set_ylabel("perplexity ratio to the float model (1 is no loss)")
        ratios = [one.figures["perplexity_ratio"] for one in shown if one.figures["perplexity_ratio"]]
        limit = result.constraints.perplexity_ratio
        top = max([1.02, *(min(one, 2.0) for one in ratios if one), *([limit] if limit else [])])
        for panel, value in ((left, _megabytes), (right, lambda one: _ratio(one, top))):
            _points(panel, result, shown, value)
            _labels(panel, result, [*front, *(one for one in shown if one.is_float)], value, numbers)
        stairs = sorted(front, key=lambda one: _ms(one))
        if len(stairs) > 1:
            best_so_far, line = math.inf, []
            for one in stairs:
                if _megabytes(one) < best_so_far:
                    best_so_far = _megabytes(one)
                    line.append(one)
            left.plot(
                [_ms(one) for one in line],
                [_megabytes(one) for one in line],
                color=KEEPS,
                lw=1.2,
                alpha=0.5,
                zorder=1,
            )
        if limit is not None:
            right.axhline(limit, color=BEST, linestyle=(0, (4, 3)), linewidth=1.1)
            right.annotate(
                f"limit {limit:g}", (1.0, limit), xycoords=("axes fraction", "data"), xytext=(-3, 3),
                textcoords="offset points", ha="right", color=BEST,
            )  # fmt: skip
        _limit_lines(left, result)
        right.set_ylim(min([0.985, *(one - 0.005 for one in ratios if one)]), top + 0.08 * (top - 0.98))
        for panel in (left, right):
            _plain_ticks(panel)
        _legend(figure, result)
    return figure


def write_picture(result: "TuneResult", numbers: dict[str, int], png: Path, svg: Path) -> None:
    """Write the picture as PNG and SVG."""
    import matplotlib as mpl

    figure = draw(result, numbers)
    # Text stays text: it can be searched, and the file holds no fonts. No date: equal results, equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lmopt"}):
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    svg.write_text(content.getvalue(), encoding="utf-8")
    figure.savefig(png, metadata={"Software": None})


def _points(panel: Any, result: "TuneResult", shown: Sequence[Trial], value: Any) -> None:
    for one in shown:
        spread = one.token_p50_ms
        assert spread is not None
        kind = _kind(result, one)
        color = {"best": BEST, "float": FLOAT, "keeps": KEEPS, "breaks": BREAKS}[kind]
        panel.errorbar(
            _ms(one), value(one),
            xerr=[[max(0.0, spread.median - spread.least)], [max(0.0, spread.most - spread.median)]],
            fmt={"best": "*", "float": "s"}.get(kind, "o"),
            markersize={"best": 17, "float": 7.5}.get(kind, 7),
            color=color, markeredgecolor="white", markeredgewidth=0.8, ecolor=color, elinewidth=0.9,
            zorder={"best": 5, "keeps": 4, "float": 3}.get(kind, 2),
        )  # fmt: skip


def _labels(
    panel: Any, result: "TuneResult", wanted: Sequence[Trial], value: Any, numbers: dict[str, int]
) -> None:
    """Write numbers beside points, but not over each other."""
    placed: list[tuple[float, float]] = []
    order = sorted(
        {one.name: one for one in wanted}.values(),
        key=lambda one: result.best is None or one.name != result.best.name,
    )
    for one in order[: 3 * _MOST_LABELS]:
        spot = (math.log(_ms(one)), math.log(max(value(one), 1e-9)))
        if any(abs(spot[0] - x) < 0.07 and abs(spot[1] - y) < 0.02 for x, y in placed):
            continue
        placed.append(spot)
        panel.annotate(
            str(numbers[one.name]), (_ms(one), value(one)), xytext=(6, 5), textcoords="offset points", fontsize=8.5
        )  # fmt: skip


def _kind(result: "TuneResult", one: Trial) -> str:
    if result.best is not None and one.name == result.best.name:
        return "best"
    if one.is_float:
        return "float"
    return "breaks" if result.constraints.broken(one.figures) else "keeps"


def _limit_lines(panel: Any, result: "TuneResult") -> None:
    limits = result.constraints
    if limits.artifact_bytes is not None:
        panel.axhline(limits.artifact_bytes / 1e6, color=BEST, linestyle=(0, (4, 3)), linewidth=1.1)
    if limits.token_p50_ms is not None:
        panel.axvline(limits.token_p50_ms, color=BEST, linestyle=(0, (4, 3)), linewidth=1.1)


def _plain_ticks(panel: Any) -> None:
    """Write 5, 10, 20 along a logarithmic axis in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, scale in ((panel.xaxis, panel.get_xscale()), (panel.yaxis, panel.get_yscale())):
        if scale != "log":
            continue
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, result: "TuneResult") -> None:
    from matplotlib.lines import Line2D

    def entry(marker: str, size: float, color: str, label: str) -> Any:
        return Line2D([], [], linestyle="", marker=marker, markersize=size, color=color, label=label)

    entries = [entry("*", 14, BEST, "recommended")] if result.best is not None else []
    entries += [
        entry("o", 7, KEEPS, "keeps the limits"),
        entry("o", 7, BREAKS, "breaks a limit"),
        entry("s", 7, FLOAT, "float model"),
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), frameon=False)


def _ms(one: Trial) -> float:
    return one.figures["token_p50_ms"] or 0.0


def _megabytes(one: Trial) -> float:
    return (one.figures["artifact_bytes"] or 0.0) / 1e6


def _ratio(one: Trial, most: float) -> float:
    return min(one.figures["perplexity_ratio"] or 1.0, most)
