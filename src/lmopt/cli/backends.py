"""`lmopt backends`: every engine, exporter and compression step, and whether it can be used."""

from typing import Any

from lmopt.cli.output import Output
from lmopt.registry import PluginStatus, backends, exporters, steps


def list_backends(out: Output) -> None:
    """List engines, exporters and compression steps: from which distribution, in which state, for what.

    Nothing heavy is imported: an engine whose modules are found counts as ready. `lmopt doctor` imports
    them all.
    """
    engines, writers, methods = backends.status(), exporters.status(), steps.status()
    rows = []
    for engine in engines:
        can = engine.spec.can if engine.spec else None
        cells = (can.formats, can.devices, can.dtypes) if can else ((), (), ())
        rows.append((engine.name, engine.distribution, _state(engine), *(", ".join(cell) for cell in cells)))
    out.table(("engine", "from", "state", "reads", "devices", "computes in"), rows, left=6)
    rows = []
    for writer in writers:
        about = (
            (writer.spec.format, ", ".join(writer.spec.targets), writer.spec.verify_with)
            if writer.spec
            else ("", "", "")
        )
        rows.append((writer.name, writer.distribution, _state(writer), *about))
    out.table(("exporter", "from", "state", "writes", "targets", "verified on"), rows, left=6)
    rows = [
        (one.name, one.distribution, _state(one), one.spec.description if one.spec else "") for one in methods
    ]
    out.table(("compression step", "from", "state", "what it does"), rows, left=4)
    every: list[PluginStatus[Any]] = [*engines, *writers, *methods]
    for problem in dict.fromkeys(one.problem for one in every if one.problem):
        out.text(problem, style="yellow")
    out.result(
        {
            "backends": [_describe(one) for one in engines],
            "exporters": [_describe(one) for one in writers],
            "compressors": [_describe(one) for one in methods],
        }
    )


def _state(one: PluginStatus[Any]) -> str:
    if one.spec is None:
        return "broken"
    return "missing" if one.problem else "ready"


def _describe(one: PluginStatus[Any]) -> dict[str, Any]:
    return {
        "name": one.name,
        "distribution": one.distribution,
        "state": _state(one),
        "problem": one.problem,
        "spec": one.spec,
    }
