"""A picture of a training."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from lmopt.training.result import Evaluation

_BLUE: Final = "#3b6fb6"
_ORANGE: Final = "#d9822b"


def plot_losses(path: Path, losses: Sequence[float], evaluations: Sequence[Evaluation]) -> Path | None:
    """Draw the loss by step, its running mean, and what was measured on held-out text.

    Args:
        path: PNG file to write.
        losses: A value a step.
        evaluations: Held-out perplexities, drawn as their logarithm, which is comparable to the loss.

    Returns:
        The path, or `None` where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None or not losses:
        return None
    from matplotlib.figure import Figure  # without pyplot: no display is looked for

    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=150)
    panel = figure.subplots()
    steps = np.arange(1, len(losses) + 1)
    panel.plot(steps, losses, color=_BLUE, alpha=0.3, linewidth=0.8)
    window = max(1, len(losses) // 50)
    sums = np.cumsum([0.0, *losses])
    means = (sums[window:] - sums[:-window]) / window
    panel.plot(steps[window - 1 :], means, color=_BLUE, linewidth=1.6, label=f"loss, mean of {window} steps")
    if evaluations:
        panel.plot(
            [one.step for one in evaluations],
            [one.perplexity.mean_nll for one in evaluations],
            color=_ORANGE,
            marker="o",
            markersize=4,
            label=f"held-out text, at the end perplexity {evaluations[-1].perplexity.value:.2f}",
        )
    panel.set_xlabel("optimiser step")
    panel.set_ylabel("loss, nats a token")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    draft = path.with_name(f".{path.name}.tmp")
    figure.savefig(draft, format="png")
    draft.replace(path)
    return path
