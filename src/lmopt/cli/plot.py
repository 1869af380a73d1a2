"""The picture that `lmopt demo` draws."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from lmopt.evaluation import Perplexity, Speed

_BLUE: Final = "#3b6fb6"
_ORANGE: Final = "#d9822b"


def can_plot() -> bool:
    """Say whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(path: Path, title: str, speeds: "Mapping[str, Speed]", quality: "Mapping[str, Perplexity]") -> None:
    """Draw speed and perplexity by engine.

    Args:
        path: PNG file to write.
        title: Line above both panels.
        speeds: Engine to speed; drawn as decoding tokens/s, whiskers from the least to the largest round.
        quality: Engine to perplexity; whiskers are one standard error, which the text causes and all
            engines share.
    """
    from matplotlib.figure import Figure  # without pyplot: no display is looked for

    figure = Figure(figsize=(9.0, 1.7 + 0.55 * max(2, len(speeds))), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")

    names = list(speeds)[::-1]
    rates = [speeds[name].decode_tokens_per_s for name in names]
    spread = [[one.median - one.least for one in rates], [one.most - one.median for one in rates]]
    left.barh(
        names,
        [one.median for one in rates],
        xerr=spread,
        height=0.55,
        color=_BLUE,
        ecolor="#333333",
        capsize=3,
    )
    for place, rate in enumerate(rates):
        left.annotate(
            f"{rate.median:.1f}", (rate.most, place), xytext=(5, 0), textcoords="offset points", va="center"
        )
    left.set_xlim(0, 1.18 * max((one.most for one in rates), default=1.0))
    left.set_xlabel("decoding, tokens/s (more is better)")

    names = list(quality)[::-1]
    values = [quality[name] for name in names]
    right.errorbar(
        [one.value for one in values],
        range(len(names)),
        xerr=[one.stderr for one in values],
        fmt="o",
        color=_ORANGE,
        ecolor="#333333",
        capsize=3,
    )
    for place, one in enumerate(values):
        right.annotate(
            f"{one.value:.3f}", (one.value, place), xytext=(0, 7), textcoords="offset points", ha="center"
        )
    right.set_yticks(range(len(names)), names)
    right.set_ylim(-0.6, len(names) - 0.3)
    right.set_xlabel("perplexity ± its standard error (less is better)")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    figure.savefig(path)
