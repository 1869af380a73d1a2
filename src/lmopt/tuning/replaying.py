"""Make a recommended deployment again from its recipe, and see whether it does what was said of it."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from lmopt.compression.recipe import step_from_dict
from lmopt.errors import InputError
from lmopt.evaluation import folder_size_bytes
from lmopt.platform import machine
from lmopt.registry import backends
from lmopt.tuning.jobs import CALIBRATION
from lmopt.tuning.making import ScreenedError, Workshop
from lmopt.tuning.plan import Plan
from lmopt.tuning.publishing import measured_record, publish_copy
from lmopt.tuning.result import TuneResult
from lmopt.tuning.space import Candidate, Recipe, Route, Space
from lmopt.tuning.trials import Trial
from lmopt.tuning.work import InProcess, Limits, Progress, WorkError

HOLDS: Final = 0.1
"""How far a time may lie from the predicted one, as a share."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A deployment that was made again.

    Attributes:
        artifact: Folder that it was published to.
        trial: What was measured of it now.
        predicted: What the search had measured.
        deviation: Time of a token now over that of the search, less 1.
        same_machine: Whether the search ran on a machine of this kind.
    """

    artifact: Path
    trial: Trial
    predicted: Trial
    deviation: float
    same_machine: bool

    @property
    def holds(self) -> bool:
        """Whether the time of a token is within 10 % of the predicted one, or shorter."""
        return self.deviation <= HOLDS


def replay(
    result: TuneResult | str | Path,
    folder: str | Path,
    *,
    source: str | None = None,
    starts: int = 3,
    trust: bool = False,
    progress: Progress | None = None,
) -> Replay:
    """Compress and export again by the recipe of a search's recommendation, publish it, and measure it.

    Args:
        result: Of `lmopt.tune`, its `tune.json`, or its output folder.
        folder: Folder to create.
        source: The model, where it is no longer where it was, or another one of its kind.
        starts: Fresh processes that speed is measured in.
        trust: As for `lmopt.Runtime`.
        progress: Called with the stage's name, the steps done and their total.

    Raises:
        InputError: The file is no result, it recommends nothing, or a step of the recipe failed.
        ArtifactExistsError: Something is at `folder` that lmopt did not write.
    """
    if not isinstance(result, TuneResult):
        result = TuneResult.from_file(result)
    best = result.best
    if best is None:
        raise InputError(
            f"the search in {result.folder} recommends nothing, so there is nothing to make again"
        )
    tell = progress or (lambda stage, done, total: None)
    folder = Path(folder)
    study = result.folder / "study"
    with tempfile.TemporaryDirectory(prefix="lmopt-replay-", dir=_existing(folder)) as scratch:
        plan = _plan(result, source or result.source, Path(scratch), study, trust)
        runner = InProcess(Path(scratch) / "last.log")

        def do(call: str, arguments: Mapping[str, Any], stage: str) -> dict[str, Any]:
            tell(stage, 0, 1)
            return runner(call, arguments, Limits(plan.trial_seconds, plan.memory_bytes), tell)

        workshop, candidate = Workshop(plan, do), _candidate(best)
        try:
            if plan.text is not None:
                do(
                    "lmopt.tuning.jobs:prepare",
                    {
                        "source": plan.source, "backend": plan.reference, "dtype": plan.dtype, "trust": trust,
                        "text": str(plan.text), "score_tokens": plan.workload.score_tokens, "folder": scratch,
                    },
                    "read the float model",
                )  # fmt: skip
            place = workshop.place(candidate)
            found = [
                do(
                    "lmopt.tuning.jobs:measure",
                    {
                        "place": place, "backend": best.backend, "device": plan.device,
                        "dtype": plan.dtype if place == plan.source and plan.reference is None else "auto",
                        "threads": best.threads if candidate.route.takes_threads else None,
                        "trust": trust, "workload": asdict(plan.workload),
                        "folder": scratch if number == 0 and plan.text is not None else None, "give_up_ms": None,
                    },
                    "measure",
                )
                for number in range(starts)
            ]  # fmt: skip
            trial = replace(
                best.with_speeds([one["speed"] for one in found]),
                peak_memory_bytes=max(one["peak_memory_bytes"] for one in found),
                artifact_bytes=folder_size_bytes(Path(place))
                if candidate.route.exporter
                else best.artifact_bytes,
                loss=found[0]["loss"],
            )
            record = measured_record(trial, machine(), result.versions)
            artifact = publish_copy(workshop.publishable(candidate), folder, trial, record)
        except (WorkError, ScreenedError) as failure:
            raise InputError(
                f"{best.name} cannot be made again of {plan.source}: {failure}. Was it made of another model?"
            ) from None
    predicted, now = (one.figures["token_p50_ms"] for one in (best, trial))
    assert predicted is not None
    assert now is not None
    same = all(result.machine.get(key) == value for key, value in _kind(machine()).items())
    return Replay(artifact.path, trial, best, now / predicted - 1, same)


def _plan(result: TuneResult, source: str, scratch: Path, study: Path, trust: bool) -> Plan:
    best = result.best
    assert best is not None
    score = study / "score.txt"
    calibration = next(
        (one for one in (study / "given-calibration.txt", study / CALIBRATION) if one.exists()), None
    )
    # What was recommended is made whatever it costs now: the caller sees the figures.
    return Plan(
        source=source,
        identity="",
        label=result.label,
        reference=best.backend if best.recipe == "as exported" else None,
        shape=None,
        dtype=result.dtype,
        device=result.device,
        trust=trust,
        space=Space((), (), ()),
        limits=replace(result.constraints, perplexity_ratio=None, kl_mean=None),
        objectives=result.objectives,
        workload=result.workload,
        text=score if score.exists() else None,
        calibration=calibration,
        folder=scratch,
        trial_seconds=3600.0,
        memory_bytes=None,
    )


def _candidate(trial: Trial) -> Candidate:
    calibrated = any(step_from_dict(one).needs_texts for one in trial.steps)
    recipe = Recipe(trial.recipe, trial.steps, stored=trial.stored, calibrated=calibrated)
    threads = "threads" in backends.require(trial.backend).can.features
    route = Route(trial.backend, trial.exporter, trial.target, dict(trial.options), takes_threads=threads)
    return Candidate(recipe, route, trial.threads)


def _kind(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("cpu", "usable_cpus", "instruction_sets", "architecture")}


def _existing(folder: Path) -> Path:
    place = folder.absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    return place
