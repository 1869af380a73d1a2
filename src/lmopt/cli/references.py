"""`lmopt eval --pairs` and `lmopt compress --pairs`: what encoder-decoders write against what is right."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmopt.cli.output import Output

if TYPE_CHECKING:
    from lmopt.interop.references import Judgement, Pairs
    from lmopt.runtime import Runtime


def pairs_to_judge(path: Path) -> "Pairs":
    """Read pairs, and see to it that they can be judged: before the work, not after it."""
    from lmopt.interop.references import judging_library, read_pairs

    pairs = read_pairs(path)
    judging_library(pairs)
    return pairs


def judged(out: Output, runtimes: "Mapping[str, Runtime]", pairs: "Pairs", **options: Any) -> dict[str, Any]:
    """Judge one or several runtimes on the same pairs, and show the figures side by side.

    Args:
        out: Takes the table.
        runtimes: By the name of their column.
        pairs: From `pairs_to_judge`.
        **options: As for `lmopt.interop.references.judge`.

    Returns:
        Judgement by name.
    """
    from lmopt.interop.references import judge

    found: dict[str, Judgement] = {}
    for name, runtime in runtimes.items():
        with out.progress() as tell:
            found[name] = judge(runtime, pairs, progress=tell, **options)
    first = next(iter(found.values()))
    rows = [
        [metric.replace("_", " "), *(f"{one.metrics[metric]:.4f}" for one in found.values())]
        for metric in first.metrics
    ]
    if "words" in first.counts:
        wrong = [f"{one.counts['wrong_words']} of {one.counts['words']}" for one in found.values()]
        rows.append(["wrong words", *wrong])
    out.table(["", *found], rows, title=f"{first.counts['items']} sources")
    out.note(first.how)
    return dict(found)
