"""Hand the recommended deployment on: as an artefact that says how it was made and what it does."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmopt.artifact import Artifact, publish
from lmopt.registry import backends
from lmopt.tuning.trials import Trial


def publish_copy(made: Path, folder: Path, trial: Trial, measured: Mapping[str, Any]) -> Artifact:
    """Publish a copy of an artefact with what was measured of it.

    Args:
        made: Artefact in the study's folder; it has passed the parity gate when it was exported.
        folder: Where it goes; an artefact that is there is replaced.
        trial: What it is.
        measured: Goes into the manifest's `measurements`, with the recipe.

    Returns:
        The published artefact.
    """
    artifact = Artifact.open(made)
    manifest = artifact.manifest
    needed = sum(one["bytes"] for one in manifest["files"].values())
    with publish(folder, overwrite=True, needed=needed) as staging:
        for name in manifest["files"]:
            target = staging.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.path / name, target)
        for field in staging.manifest:
            staging.manifest[field] = json.loads(json.dumps(manifest[field]))
        if trial.steps:
            staging.manifest["recipe"] = {"steps": [dict(one) for one in trial.steps]}
        staging.manifest["measurements"] = {**staging.manifest["measurements"], "tune": dict(measured)}
    return Artifact.open(folder, verify=False)


def deployment(trial: Trial) -> dict[str, Any]:
    """How to run a trial: the arguments of `lmopt.Runtime`, beside the folder."""
    threads = "threads" in backends.spec(trial.backend).can.features
    return {"backend": trial.backend, **({"threads": trial.threads} if threads else {})}


def measured_record(trial: Trial, machine: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """What a manifest keeps of a search: no times of day and no paths, so that two builds are equal."""
    return {
        "run_with": deployment(trial),
        "machine": dict(machine),
        "versions": dict(versions),
        "figures": trial.figures,
        "loss": dict(trial.loss or {}),
        "starts": trial.starts,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
