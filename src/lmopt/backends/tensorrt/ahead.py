"""Compile an artefact's engines ahead of time, or only check that they could be: `lmopt build`."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmopt.accelerators import cuda
from lmopt.artifact import Artifact
from lmopt.backends.tensorrt.building import BuildOptions, Plan, check_network, open_network
from lmopt.backends.tensorrt.engine_cache import engine_folder, graph_names, graph_of, plan_for, save_plan
from lmopt.backends.tensorrt.flavour import load
from lmopt.errors import UnsupportedOptionError


def build_folder(
    folder: Path,
    options: Mapping[str, Any],
    *,
    targets: Sequence[str] = (),
    check: bool = False,
    output: Path | None = None,
    tell: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Compile the `onnx` format of an artefact into the cache, one engine a target and graph.

    Args:
        folder: The artefact.
        options: Fields of `BuildOptions`.
        targets: Compute capabilities, for RTX; empty: all that RTX builds for by default.
        check: Only read the graph and hold its types against the targets; nothing is compiled.
        output: File to copy the engine to as well; its record goes beside it.
        tell: Called with the stage, the steps done and their total.

    Returns:
        A row for each engine: graph, targets, flavour, version, types, and, where it was compiled, bytes and seconds.

    Raises:
        UnsupportedOptionError: An option is unknown, or several engines would go to one file.
        LmoptError: As for `plan_for`.
    """
    chosen, rest = BuildOptions.from_options(options)
    if rest:
        raise UnsupportedOptionError(
            f"there is no build option {sorted(rest)[0]!r}; there are {', '.join(BuildOptions.__dataclass_fields__)}"
        )
    artifact = Artifact.open(folder, verify=False)
    graphs = graph_names(artifact)
    wanted = [replace(chosen, compute_capabilities=(one,)) for one in targets] or [chosen]
    engines = [(graph, one) for one in wanted for graph in graphs]
    if output is not None and (check or len(engines) > 1):
        raise UnsupportedOptionError(
            f"output={output} takes one engine; asked for {'a check only' if check else f'{len(engines)} of them'}"
        )
    if check:
        return [row for graph in graphs for row in _check(artifact, graph, wanted)]
    rows = []
    for place, (graph, one) in enumerate(engines):
        name = ", ".join(one.compute_capabilities) or "default targets"
        if tell is not None:
            tell(f"compile {graph} for {name}", place, len(engines))
        began = time.perf_counter()
        plan = plan_for(artifact, one, facts=artifact.facts, device=_device(one), file=graph)
        rows.append({"graph": graph, **_row(plan), "seconds": time.perf_counter() - began})
        if output is not None:
            save_plan(plan, output)
    return rows


def cache_path() -> Path:
    """Where compiled engines are kept."""
    return engine_folder().path


def _check(artifact: Artifact, graph: str, wanted: Sequence[BuildOptions]) -> list[dict[str, Any]]:
    rows = []
    best = wanted[0].best_logits
    with open_network(graph_of(artifact, graph), wanted[0].flavour, best_logits=best) as (network, prepared):
        for one in wanted:
            types = check_network(network, prepared, one)
            rows.append(
                {
                    "graph": graph,
                    "targets": list(one.compute_capabilities),
                    "flavour": network.flavour.name,
                    "version": network.flavour.version,
                    "types": types,
                }
            )
    return rows


def _row(plan: Plan) -> dict[str, Any]:
    return {
        "targets": list(plan.targets),
        "flavour": plan.flavour,
        "version": plan.version,
        "types": dict(plan.types),
        "compute_type": plan.compute_type,
        "bytes": len(plan.data),
        "from_cache": plan.from_cache,
        "profiles": [one.to_dict() for one in plan.profiles],
        "warnings": list(plan.log),
    }


def _device(options: BuildOptions) -> dict[str, Any] | None:
    """What an engine depends on of the first GPU, for the flavour that compiles on it."""
    state = cuda()
    if load(options.flavour).has_targets or not state.devices:
        return None
    from lmopt.backends.tensorrt.engine import key_of

    return key_of(state.devices[0])
