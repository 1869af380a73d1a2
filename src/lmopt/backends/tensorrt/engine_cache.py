"""Compiled engines on this user's disk: found again by everything that they depend on.

What is shipped is the ONNX graph; an engine is compiled where it runs, and never accepted from elsewhere
unless the user says so by name, as loading one means running its code.
"""

import hashlib
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from lmopt import __version__
from lmopt.artifact.cache import cache_folder
from lmopt.artifact.hashing import file_hash
from lmopt.artifact.manifest import canonical
from lmopt.backends.tensorrt.building import BuildOptions, Plan, build_plan
from lmopt.backends.tensorrt.flavour import Flavour, load
from lmopt.backends.tensorrt.profiles import Profile
from lmopt.backends.tensorrt.sealed import SealedFolder
from lmopt.contracts import ArtifactView
from lmopt.errors import ArtifactNotFoundError, CorruptArtifactError, UnsafeArtifactError, UnsupportedError
from lmopt.safefiles import check_onnx_external_data, open_regular, parse_json
from lmopt.types import ModelFacts, TensorSpec

GRAPH: Final = "model.onnx"
RECIPE: Final = 2
"""Version of what `preparing` and `building` do to a graph: to be raised when their result changes."""
BUILT_AGAIN: Final = "a compiled engine in the cache is not used and is built again"
_RECORD_SUFFIX: Final = ".json"
_MOST_RECORD: Final = 1 << 22


def plan_for(
    artifact: ArtifactView,
    options: BuildOptions,
    *,
    facts: ModelFacts,
    device: Mapping[str, Any] | None = None,
    again: bool = False,
    file: str = GRAPH,
) -> Plan:
    """Give the plan of a graph of an artefact's `onnx` format: out of the cache, or built and put there.

    Processes that ask for one plan at once share one build. An entry that is damaged, or that this user's key
    has not sealed, is never loaded: it is built again, with one warning.

    Args:
        artifact: Holds the format `onnx` in the dialect `portable`.
        options: See `BuildOptions`.
        facts: Of the model.
        device: What a plan depends on of the GPU that will run it: `name`, `compute_capability` (`"8.9"`),
            `multiprocessors`, `memory_bytes`, `driver`, `runtime`. `None` where there is none: then only RTX builds.
        again: Whether to remove what the cache has and build anew: TensorRT has refused it.
        file: Which graph, of an artefact that has several.

    Raises:
        UnsupportedError: The artefact is in another dialect, or the flavour needs a GPU for building.
        UnsafeArtifactError: The cache's folder is somebody else's, open to others, or a link.
        LockTimeoutError: Another process has been building the same for too long.
        EngineBuildError, UnsupportedPrecisionError: As for `build_plan`.
    """
    flavour = load(options.flavour)
    if not flavour.has_targets and device is None:
        raise UnsupportedError(
            f"{flavour.name} {flavour.version} compiles on the GPU that will run the engine, and there is none here. "
            "Check `lmopt doctor`, or compile for RTX cards: flavour='tensorrt_rtx'"
        )
    if flavour.has_targets and device is not None and not options.compute_capabilities:
        options = replace(options, compute_capabilities=(str(device["compute_capability"]),))
    model = graph_of(artifact, file)
    key = plan_key(model, options, flavour, facts=facts, device=device)
    name = hashlib.sha256(canonical(key, "the engine's key")).hexdigest()
    folder = engine_folder()
    if not again and (found := _sound(folder, name, key, quiet=True)) is not None:
        return found
    with folder.locked(name):
        if again:
            folder.remove(name)
        elif (found := _sound(folder, name, key)) is not None:
            return found
        timings = (
            _Timings(folder, flavour, device) if flavour.has_timing_cache and options.timing_cache else None
        )
        plan = build_plan(model, options, facts=facts, timings=timings.read() if timings else b"")
        if timings is not None and plan.timings:
            timings.write(plan.timings)
        folder.write(name, plan.data, {"key": key, **record_of(plan)})
        return plan


def engine_folder() -> SealedFolder:
    """Give the folder of compiled engines inside lmopt's cache; it is made where it is not there."""
    return SealedFolder(cache_folder() / "engines")


def graph_names(artifact: ArtifactView) -> list[str]:
    """Name the graphs of an artefact: one, or those of an encoder and its decoder."""
    written = artifact.manifest["formats"].get("onnx", {})
    return [written["encoder"], written["decoder"]] if "encoder" in written else [GRAPH]


def graph_of(artifact: ArtifactView, file: str = GRAPH) -> Path:
    """Give a verified graph of an artefact.

    Raises:
        ArtifactNotFoundError: The artefact has no `onnx` format.
        UnsupportedError: It is in a dialect of another engine.
        CorruptArtifactError: A file is damaged.
    """
    written = artifact.manifest["formats"].get("onnx")
    if written is None:
        raise ArtifactNotFoundError(
            f"{artifact.path} has no format 'onnx', which TensorRT is compiled from. Export the model with it: "
            "lmopt.Exporter('onnx').export(model, folder)"
        )
    target = written.get("target", "portable")
    if target != "portable":
        raise UnsupportedError(
            f"the graph in {artifact.path} is in the dialect {target!r}, with operators that only that engine has. "
            "Export the model for all: lmopt.Exporter('onnx', target='portable').export(model, folder)"
        )
    for name in written.get("files", ()):
        artifact.file(name)
    return artifact.file(file)


def plan_key(
    model: Path,
    options: BuildOptions,
    flavour: Flavour,
    *,
    facts: ModelFacts,
    device: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Gather everything that a plan depends on: the graph's bytes, the compiler, the target, and every choice.

    Neither paths nor times are part of it, nor the plan's own bytes, which differ from build to build.
    """
    data = sorted({one.path for one in check_onnx_external_data(model)})
    parser = getattr(flavour.module, "get_nv_onnx_parser_version", lambda: 0)
    # RTX finishes its kernels on the GPU that loads the plan; the standard flavour has chosen them before.
    about = {"targets": sorted(options.compute_capabilities)} if flavour.has_targets else dict(device or {})
    return {
        "lmopt": __version__,
        "recipe": RECIPE,
        "graph": file_hash(model)[0],
        "data": {one.name: file_hash(one)[0] for one in data},
        "flavour": flavour.name,
        "version": flavour.version,
        "parser": int(parser()),
        "system": [platform.system(), platform.machine()],
        "device": about,
        "options": options.to_dict(),
        "context": facts.context_length,
    }


def record_of(plan: Plan) -> dict[str, Any]:
    """Give what is kept beside a plan's bytes, as plain data."""
    return {
        "plan": {
            "flavour": plan.flavour,
            "version": plan.version,
            "inputs": [asdict(one) for one in plan.inputs],
            "outputs": [asdict(one) for one in plan.outputs],
            "profiles": [one.to_dict() for one in plan.profiles],
            "compute_type": plan.compute_type,
            "targets": list(plan.targets),
            "types": dict(plan.types),
            "log": list(plan.log),
        }
    }


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan to a file of the user's choice, its record beside it (`.json`), for `open_plan`."""
    path.write_bytes(plan.data)
    record = {**record_of(plan), "sha256": hashlib.sha256(plan.data).hexdigest()}
    path.with_name(path.name + _RECORD_SUFFIX).write_bytes(canonical(record, "the plan's record"))


def open_plan(path: Path, *, trust_engine: bool, options: BuildOptions) -> Plan:
    """Read a plan that somebody else compiled, with the record that `save_plan` writes beside it.

    Args:
        path: The plan.
        trust_engine: Whether the user says that its code may run.
        options: Only the flavour is read.

    Raises:
        UnsafeArtifactError: It is not trusted.
        ArtifactNotFoundError: The plan or its record is not there.
        CorruptArtifactError: They do not belong together.
        UnsupportedError: Another TensorRT has compiled it.
    """
    if trust_engine is not True:
        raise UnsafeArtifactError(
            f"{path} is a compiled engine: native code that runs with your rights. Compile it here from the exported "
            "artefact, or, if you know who made it, say so: trust_engine=True"
        )
    with open_regular(path.with_name(path.name + _RECORD_SUFFIX)) as (file, _):
        record = parse_json(file.read(_MOST_RECORD), str(path) + _RECORD_SUFFIX)
    with open_regular(path) as (file, _):
        data = file.readall()
    if not isinstance(record, dict) or record.get("sha256") != hashlib.sha256(data).hexdigest():
        raise CorruptArtifactError(f"{path} is not the plan that {path}{_RECORD_SUFFIX} describes")
    plan = _plan_from(data, record)
    flavour = load(options.flavour if options.flavour != "auto" else plan.flavour)
    if (flavour.name, flavour.version) != (plan.flavour, plan.version):
        raise UnsupportedError(
            f"{path} was compiled by {plan.flavour} {plan.version}; this Python has {flavour.name} {flavour.version}, "
            "and TensorRT loads plans of the very same version only. Compile it anew from the exported artefact"
        )
    return plan


def _sound(folder: SealedFolder, name: str, key: Mapping[str, Any], *, quiet: bool = False) -> Plan | None:
    """Give an entry that is sealed, whole, and built for this very key; remove and warn of any other."""
    try:
        found = folder.read(name)
        if found is None:
            return None
        content, record = found
        if canonical(record.get("key"), "the record") != canonical(key, "the key"):
            raise CorruptArtifactError(f"{folder.path / name} was built for another key")
        return _plan_from(content, record)
    except CorruptArtifactError as error:
        if quiet:  # looked at again under the lock: another process may be healing it right now
            return None
        warnings.warn(f"{BUILT_AGAIN}: {error}", RuntimeWarning, stacklevel=4)
        folder.remove(name)
        return None


def _plan_from(content: bytes, record: Mapping[str, Any]) -> Plan:
    """Make a plan of its bytes and its record."""
    try:
        told = record["plan"]
        inputs, outputs = (
            tuple(TensorSpec(one["name"], one["dtype"], tuple(one["shape"])) for one in told[side])
            for side in ("inputs", "outputs")
        )
        return Plan(
            data=content,
            flavour=told["flavour"],
            version=told["version"],
            inputs=inputs,
            outputs=outputs,
            profiles=tuple(Profile(**one) for one in told["profiles"]),
            compute_type=told["compute_type"],
            targets=tuple(told["targets"]),
            types=told["types"],
            log=tuple(told["log"]),
            from_cache=True,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifactError(
            f"the record of a compiled engine lacks or misnames a field: {error}"
        ) from error


class _Timings:
    """What the standard flavour found out about kernels on one device, kept for the next build."""

    def __init__(self, folder: SealedFolder, flavour: Flavour, device: Mapping[str, Any] | None) -> None:
        about = {"timings": flavour.version, "device": dict(device or {})}
        self._folder = folder
        self._name = "timings-" + hashlib.sha256(canonical(about, "the timings' key")).hexdigest()

    def read(self) -> bytes:
        try:
            found = self._folder.read(self._name)
        except CorruptArtifactError:
            return b""  # it only saves time
        return b"" if found is None else found[0]

    def write(self, content: bytes) -> None:
        with self._folder.locked(self._name):
            self._folder.write(self._name, content, {})
