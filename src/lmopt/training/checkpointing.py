"""Checkpoints: whole or not there, hashed, and without a pickle in them."""

import contextlib
import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmopt.artifact import Artifact, is_artifact, publish
from lmopt.errors import ArtifactError, CorruptArtifactError
from lmopt.evaluation import Perplexity
from lmopt.training.config import TrainingConfig
from lmopt.training.learner import Learner
from lmopt.training.parallel import spread_like, whole
from lmopt.training.result import Evaluation, Journal

FORMAT: Final = "training"
_NAME: Final = re.compile(r"step-(\d{8})")
_REMOVED: Final = ".removed"
_WEIGHTS, _OPTIMIZER, _JOURNAL = "weights.safetensors", "optimizer.safetensors", "journal.safetensors"


@dataclass(frozen=True, slots=True)
class Course:
    """What a run must have in common with the checkpoint that it goes on from.

    Attributes:
        config: Fields of `TrainingConfig`.
        loss: What the loss says of itself.
        source: What the data say of themselves.
        frozen: Hash of the weights that are not trained, and so not kept.
        processes: Processes, each with its own random numbers.
    """

    config: Mapping[str, Any]
    loss: Mapping[str, Any]
    source: Mapping[str, Any]
    frozen: str
    processes: int


@dataclass(slots=True)
class Snapshot:
    """All that changes while training.

    Attributes:
        learner: Model and loss.
        optimizer: The optimiser itself, not accelerate's wrapper.
        journal: What is known of the run.
        states: Carried state of each accumulation's rows of this process, as plain tensors.
        step: Steps done.
    """

    learner: Learner
    optimizer: torch.optim.Optimizer
    journal: Journal
    states: list[list[Tensor]]
    step: int


def frozen_hash(learner: Learner) -> str:
    """Hash the weights that are not trained; empty where all are."""
    frozen = learner.frozen()
    digest = hashlib.sha256()
    for name, one in sorted(frozen.items()):
        plain = one.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {one.dtype} {tuple(one.shape)}".encode())
        digest.update(plain.numpy().data)
    return digest.hexdigest() if frozen else ""


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List steps and folders of the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if is_artifact(path))


def remove(path: Path) -> None:
    """Remove a checkpoint so that, wherever this is interrupted, it is either whole or none."""
    aside = path.with_name(f".{path.name}{_REMOVED}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
    for leftover in path.parent.glob(f".step-*{_REMOVED}"):
        shutil.rmtree(leftover, ignore_errors=True)


def save(folder: Path, snapshot: Snapshot, course: Course, accelerator: Accelerator, keep: int) -> Path:
    """Publish a checkpoint; every process must call it, the first one writes.

    Args:
        folder: Folder of all checkpoints of the run.
        snapshot: What to keep.
        course: What a resuming run must have in common.
        accelerator: Knows the processes and scales the loss.
        keep: Checkpoints that stay, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskFullError: The disk cannot hold it; earlier checkpoints are as before.
    """
    learner, journal = snapshot.learner, snapshot.journal
    weights = {name: whole(one) for name, one in {**learner.trained(), **learner.kept()}.items()}
    moments = {
        f"{name}/{key}": whole(one)
        for name, weight in learner.trained().items()
        for key, one in snapshot.optimizer.state.get(weight, {}).items()
    }
    own: dict[str, Tensor] = {"random/cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        own["random/cuda"] = torch.cuda.get_rng_state(accelerator.device)
    for place, leaves in enumerate(snapshot.states):
        own |= {f"state/{place}/{leaf}": one.detach().cpu() for leaf, one in enumerate(leaves)}
    ranks: list[dict[str, Tensor]] = gather_object([own])
    target = folder / f"step-{snapshot.step:08d}"
    if not accelerator.is_main_process:
        return target
    lines = {"losses": journal.losses, **{f"parts/{name}": line for name, line in journal.parts.items()}}
    files: dict[str, dict[str, Tensor]] = {
        _WEIGHTS: weights,
        _OPTIMIZER: moments,
        _JOURNAL: {name: torch.tensor(line, dtype=torch.float64) for name, line in lines.items()},
        **{f"rank-{rank}.safetensors": one for rank, one in enumerate(ranks)},
    }
    needed = sum(one.numel() * one.element_size() for file in files.values() for one in file.values())
    with publish(target, overwrite=True, needed=needed) as draft:
        for name, tensors in files.items():
            save_file({key: one.contiguous().cpu() for key, one in tensors.items()}, draft.path / name)
        draft.manifest["formats"] = {
            FORMAT: {
                "step": snapshot.step,
                "tokens": journal.tokens,
                "evaluations": [[one.step, one.perplexity.to_dict()] for one in journal.evaluations],
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
                **_plain(course),
            }
        }
        draft.manifest["versions"] = {"torch": torch.__version__}
    for _, old in list_checkpoints(folder)[:-keep]:
        remove(old)
    return target


def restore(
    checkpoint: Path, snapshot: Snapshot, course: Course, accelerator: Accelerator
) -> list[list[Tensor]]:
    """Put a checkpoint's content into model, optimiser, journal and random numbers.

    Returns:
        Carried state of each accumulation's rows of this process; the rest is in `snapshot`.

    Raises:
        CorruptArtifactError: It is damaged.
        ArtifactError: It belongs to another run: what differs is named.
    """
    try:
        artifact = Artifact.open(checkpoint)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(
            f"{error} To go on from the checkpoint before it, remove it: rm -r {checkpoint}"
        ) from error
    said = artifact.manifest["formats"][FORMAT]
    _check_course(checkpoint, said, _plain(course))
    weights = load_file(artifact.file(_WEIGHTS))
    own = {**snapshot.learner.trained(), **snapshot.learner.kept()}
    wrong = own.keys() ^ weights.keys() or {n for n, one in own.items() if one.shape != weights[n].shape}
    if wrong:
        raise ArtifactError(
            f"{checkpoint} is of another model: {sorted(wrong)[0]!r} is not in both, or of another shape. "
            "Give the model that the run began with, another output folder, or resume='never'."
        )
    with torch.no_grad():
        for name, one in own.items():
            one.copy_(spread_like(weights[name], one))
    trained = snapshot.learner.trained()
    for name, one in sorted(load_file(artifact.file(_OPTIMIZER)).items()):
        weight, _, key = name.rpartition("/")
        parameter = trained[weight]
        # The count of steps is a plain number; all else lies as the weight does.
        placed = spread_like(one, parameter) if one.dim() else one.to(parameter.device)
        snapshot.optimizer.state[parameter][key] = placed
    if said["scaler"] and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(said["scaler"])
    journal = load_file(artifact.file(_JOURNAL))
    snapshot.step = said["step"]
    snapshot.journal.tokens = said["tokens"]
    snapshot.journal.losses[:] = journal.pop("losses").tolist()
    snapshot.journal.parts |= {name.partition("/")[2]: line.tolist() for name, line in journal.items()}
    snapshot.journal.evaluations[:] = [
        Evaluation(step, Perplexity(**measured)) for step, measured in said["evaluations"]
    ]
    mine = load_file(artifact.file(f"rank-{accelerator.process_index}.safetensors"))
    torch.set_rng_state(mine["random/cpu"])
    if "random/cuda" in mine and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(mine["random/cuda"], accelerator.device)
    states: dict[int, dict[int, Tensor]] = {}
    for name, one in mine.items():
        if name.startswith("state/"):
            _, place, leaf = name.split("/")
            states.setdefault(int(place), {})[int(leaf)] = one.to(accelerator.device)
    return [[leaves[leaf] for leaf in sorted(leaves)] for _, leaves in sorted(states.items())]


def _plain(course: Course) -> dict[str, Any]:
    return {
        "config": dict(course.config),
        "loss": dict(course.loss),
        "source": dict(course.source),
        "frozen": course.frozen,
        "processes": course.processes,
    }


def _check_course(checkpoint: Path, said: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    config = TrainingConfig(**now["config"])
    differing = [
        f"{name} was {said['config'].get(name)!r} and is {now['config'][name]!r}"
        for name in config.same_course(said["config"])
    ]
    words = {
        "loss": "the loss",
        "source": "the data",
        "frozen": "the frozen weights",
        "processes": "processes",
    }
    differing += [
        f"{word} was {said[name]!r} and is {now[name]!r}"
        for name, word in words.items()
        if said[name] != now[name]
    ]
    if differing:
        raise ArtifactError(
            f"{checkpoint} is of another run: {'; '.join(differing)}. Resume it with what it had, give another "
            "output folder, or begin anew with resume='never' (lmopt train --no-resume), which removes it."
        )
