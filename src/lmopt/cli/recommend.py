"""`lmopt recommend`: what a model needs on this machine, and what to try first, without running it."""

from typing import Annotated

import typer

from lmopt.cli.options import Source
from lmopt.cli.output import Output, size
from lmopt.cli.tables import machine_line


def recommend(
    out: Output,
    source: Source,
    context: Annotated[
        int, typer.Option(min=1, help="Tokens of a row that the cache is reckoned for.")
    ] = 2048,
) -> None:
    """Say what a model needs here and what to try first, from its headers and a probe of the machine.

    No model is run and no weight is loaded. Tokens a second are a bound from above: what memory and arithmetic allow.
    """
    from lmopt.tuning import recommend as ask

    found = ask(source, context=context)
    out.text(
        f"{found.architecture}: {found.parameters / 1e6:,.1f} million weights, stored as {', '.join(found.stored_as)}",
        style="bold",
    )
    fits = {None: "-", True: "yes", False: "no"}
    out.table(
        ["precision", "weights", "cache", "peak memory, about", "fits", "tokens/s, at most", "limited by"],
        [
            [
                one.precision,
                size(one.weight_bytes),
                size(one.cache_bytes),
                size(one.peak_bytes),
                fits[one.fits],
                f"{one.tokens_per_s:.3g}",
                one.bound,
            ]
            for one in found.needs
        ],
        title=f"With a cache of {found.context:,} tokens, batch 1",
    )
    for place, one in enumerate(found.suggestions, 1):
        out.text(f"{place}. {one.what}", style="bold")
        out.text(f"   {one.command}")
        for why in one.reasons:
            out.text(f"   - {why.text}")
            out.text(f"     [{why.source}]", style="dim")
    probe = found.probe
    out.text(
        f"{machine_line(found.machine)}; memory gave {probe.bandwidth_bytes_per_s.most / 1e9:.1f} GB/s to "
        f"{probe.threads} threads, products {probe.flops_per_s.most / 1e9:.0f} GFLOP/s in float32 (the fastest round "
        f"of a probe of {probe.seconds:.1f} s; what else runs makes it less)",
        style="dim",
    )
    out.result(found.to_dict())
