"""`lmopt doctor`: what is there, what is missing, what is broken, and the line that mends it."""

from collections import Counter
from itertools import groupby

from lmopt import __version__
from lmopt.cli.finding import Finding
from lmopt.cli.machine_check import check_accelerators, check_machine, check_telemetry
from lmopt.cli.output import Output
from lmopt.cli.packages_check import check_floors, check_onnxruntime, check_tensorrt, installed
from lmopt.cli.plugins_check import check_plugins, stale_entry_points


def doctor(out: Output) -> None:
    """Examine engines, packages, accelerators, the machine and privacy switches.

    The exit status is 1 where something is broken; what is merely not installed is listed with the line
    that installs it.
    """
    with out.progress() as tell:
        findings = examine(check_plugins(tell))
    findings.sort(key=lambda one: _ORDER.index(one.area))
    out.ok = not any(one.state == "broken" for one in findings)
    for area, group in groupby(findings, key=lambda one: one.area):
        _show(out, area, list(group))
    counts = Counter(one.state for one in findings)
    out.text(
        f"{counts['broken']} broken, {counts['warning']} warnings, {counts['missing']} not installed, "
        f"{counts['ok']} fine.",
        style="bold" if out.ok else "bold red",
    )
    out.result({"lmopt": __version__, "findings": findings})


_ORDER = ("backends", "exporters", "compressors", "packages", "accelerators", "machine", "privacy")


def examine(plugins: list[Finding]) -> list[Finding]:
    """Add everything that is quickly looked at to the findings about plug-ins."""
    packages = installed()
    return [
        *plugins,
        *stale_entry_points(),
        *check_onnxruntime(packages),
        *check_floors(packages),
        *check_accelerators(),
        *check_tensorrt(packages),
        *check_machine(),
        *check_telemetry(),
    ]


def _show(out: Output, area: str, findings: list[Finding]) -> None:
    out.text(area, style="bold")
    width = max(len(one.name) for one in findings)
    styles = {"ok": "", "missing": "dim", "warning": "yellow", "broken": "red"}
    for one in findings:
        out.text(f"  {one.state:<8} {one.name:<{width}}  {one.text}", style=styles[one.state])
        if one.repair:
            out.text(f"  {'':<8} {'':<{width}}  -> {one.repair}", style=styles[one.state])
