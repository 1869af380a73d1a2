"""`lmopt compare`: the parity gate's measurement on any two runtimes."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lmopt.cli.opening import open_runtime
from lmopt.cli.options import Device, Dtype, Threads, Trust
from lmopt.cli.output import Output
from lmopt.cli.tables import parity_table
from lmopt.errors import InputError, LmoptError

if TYPE_CHECKING:
    from lmopt.runtime import Runtime

_BISECT_TOKENS: Final = 24
_COARSER: Final = ("float32", "float16", "bfloat16")


def compare(
    out: Output,
    reference: Annotated[
        str, typer.Argument(metavar="A", help="Reference: a model or an artefact.", show_default=False)
    ],
    candidate: Annotated[
        str, typer.Argument(metavar="B", help="What is compared with it.", show_default=False)
    ],
    backend_a: Annotated[str | None, typer.Option(help="Engine of A; default as for `lmopt run`.")] = None,
    backend_b: Annotated[str | None, typer.Option(help="Engine of B; default as for `lmopt run`.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    tolerance: Annotated[
        str | None,
        typer.Option(
            help="Limits of this type (float32, float16, int8, ...); default: the coarser of both engines' types."
        ),
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the first block and operator that differ.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text to compare on, a paragraph a prompt; default: lmopt's own, in several scripts.",
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Measure how far two runtimes are apart, in all ways of use.

    A is run by one full pass a row; B with its cache, in pieces, in padded and reordered batches, as in
    the parity gate of an export. The exit status is 1 where a limit is exceeded.
    """
    from lmopt.evaluation import engine_reference, engine_rounding, measure

    common = {"device": device, "dtype": dtype, "threads": threads, "trust": trust}
    with (
        open_runtime(out, reference, backend=backend_a, **common) as ours,
        open_runtime(out, candidate, backend=backend_b, **common) as theirs,
    ):
        facts = _common_facts(ours, theirs)
        types = [one.engine.report().dtype for one in (ours, theirs)]
        coarser = max(types, key=_COARSER.index)
        prompts = _prompts(ours, theirs, text)
        with out.progress() as tell:
            report = measure(
                engine_reference(ours.engine),
                theirs.engine,
                facts=facts,
                dtype=tolerance or coarser,
                prompts=prompts,
                rounding=engine_rounding(ours.engine),
                progress=lambda done, total: tell("compare", done, total),
            )
        place = _locate(out, ours, theirs, prompts, coarser) if bisect else None
    out.ok = report.ok
    parity_table(out, report.to_dict())
    for case in report.cases:
        if not case.ok:
            out.text(f"{case.case}: {'; '.join(case.failures)}", style="red")
    if place is not None:
        # Within the limits a jump is rounding, such as a sum that cancels: no defect is to be suggested.
        harmless = report.ok and place.get("block") is not None
        out.text(("All limits hold, so this is rounding: " if harmless else "") + place["message"])
    elif not report.ok:
        out.note("--bisect finds the first block and operator that differ")
    out.result({"parity": report.to_dict(), **({"bisect": place} if bisect else {})})


def _common_facts(ours: "Runtime", theirs: "Runtime") -> Any:
    """Facts that hold for both, or an error where the two are no versions of one model."""
    if ours.facts.vocab_size != theirs.facts.vocab_size:
        raise InputError(
            f"A has a vocabulary of {ours.facts.vocab_size} tokens, B one of {theirs.facts.vocab_size}: they are "
            "not versions of one model, so their logits cannot be compared"
        )
    limits = [one.facts.context_length for one in (ours, theirs) if one.facts.context_length is not None]
    return replace(theirs.facts, context_length=min(limits, default=None))


def _prompts(ours: "Runtime", theirs: "Runtime", text: Path | None) -> list[list[int]] | None:
    """Ids to compare on, `None` for random ones where neither side has a tokenizer."""
    from lmopt.gate import GATE_TEXTS

    tokenizer = ours.tokenizer or theirs.tokenizer
    if tokenizer is None:
        if text is not None:
            raise InputError(
                "neither A nor B has a tokenizer to read --text with; leave it out to use random ids"
            )
        return None
    texts = GATE_TEXTS if text is None else text.read_text(encoding="utf-8").split("\n\n")
    prompts = [ids for one in texts if (ids := tokenizer.encode(one.strip()))]
    if not prompts:
        raise InputError(f"{text} holds no text to compare on")
    return prompts


def _locate(
    out: Output, ours: "Runtime", theirs: "Runtime", prompts: list[list[int]] | None, dtype: str
) -> dict[str, Any]:
    """Find the place; where an engine cannot show its inside, say so."""
    import numpy as np

    from lmopt.evaluation import locate
    from lmopt.evaluation.cases import make_source

    ids = np.array(
        prompts[0][:_BISECT_TOKENS] if prompts else np.arange(_BISECT_TOKENS) % ours.facts.vocab_size
    )
    try:
        with out.progress() as tell:
            tell("bisect", 0, 1)
            facts = ours.facts.source
            source = None if facts is None else make_source(facts, 0, 0)
            found = locate(ours.engine, theirs.engine, ids, source=source, dtype=dtype)
    except LmoptError as error:
        return {"message": f"the place could not be found: {error}"}
    return {"message": str(found), **found.to_dict()}
