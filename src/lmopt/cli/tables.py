"""Tables that several verbs show."""

from collections.abc import Mapping
from typing import Any

from lmopt.cli.output import Output, size


def parity_table(out: Output, parity: Mapping[str, Any]) -> None:
    """Show a parity report as it stands in a manifest (`ParityReport.to_dict`)."""
    limits = parity["tolerance"]
    header = ("way of use", "positions", "max abs", "mean KL", "KL p99", "top-1", "verdict")
    rows = [
        (
            name,
            f"{one['positions']:,}",
            f"{one['max_abs']:.1e}",
            f"{one['kl_mean']:.1e}",
            f"{one['kl_p99']:.1e}",
            f"{one['top1']:.2%}",
            "ok" if one["ok"] else "FAILED",
        )
        for name, one in parity["cases"].items()
    ]
    out.table(header, rows, title=f"Parity of {parity['candidate']} with its reference")
    logits = (
        ""
        if limits["atol"] is None
        else f"|difference| <= {limits['atol']:g} + {limits['rtol']:g} |reference|, "
    )
    out.text(
        f"Limits of {limits['name']}: {logits}mean KL <= {limits['kl_mean']:g} nats, "
        f"top-1 >= {limits['top1']:.1%} (ties excused).",
        style="dim",
    )


def machine_line(facts: Mapping[str, Any]) -> str:
    """Describe the machine in a line (`lmopt.platform.machine`)."""
    sets = facts["instruction_sets"]
    best = [name for name in ("amx_bf16", "avx512_vnni", "avx512f", "avx2", "i8mm", "asimd") if name in sets]
    quota = "" if facts["cpu_quota"] is None else f" (quota {facts['cpu_quota']:g})"
    return (
        f"{facts['cpu']}, {facts['usable_cpus']} of {facts['cores']} cores{quota}, "
        f"{', '.join(best[:2]) or 'no known vector instructions'}, {size(facts['memory_bytes'])} memory, "
        f"{facts['os']}, Python {facts['python']}"
    )
