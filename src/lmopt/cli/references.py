"""`lmopt eval --pairs` and `lmopt compress --pairs`: what encoder-decoders write against what is right."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmopt.cli.output import Output

if TYPE_CHECKING:
    from lmopt.interop.references import Judgement, Pairs
    from lmopt.runtime import Runtime


def judged(out: Output, runtimes: "Mapping[str, Runtime]", pairs: "Pairs", **options: Any) -> dict[str, Any]:
    """Judge one or several runtimes on the same pairs, and show the figures side by side.

    Args:
        out: Takes the table.
        runtimes: By the name of their column.
        pairs: From `lmopt.interop.references.read_pairs`.
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
