"""What a search gives back."""

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmopt.errors import InputError
from lmopt.tuning.limits import LABELS, Constraints, show
from lmopt.tuning.trials import Trial
from lmopt.tuning.workload import Workload

if TYPE_CHECKING:
    from lmopt.tuning.replaying import Replay

RESULT: Final = "tune.json"
MODEL: Final = "model"
REPORT: Final = "report.html"
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class TuneResult:
    """The outcome of a search.

    Attributes:
        folder: Output folder: `model/` (the recommended artefact), `report.html`, `report.png`, `report.svg`,
            `tune.json` (all of this) and `study/`, from which the search can go on.
        source: The model, as it was opened.
        label: Its name for people.
        best: The recommended deployment; `None` where none keeps the limits.
        pareto: Deployments that keep the limits and that none beats in every objective.
        trials: Everything that was tried, failures with their reasons.
        reasons: Why, in sentences.
        constraints: The limits.
        objectives: What counted, the first one most.
        workload: What was measured.
        remeasured: The recommended deployment in fresh processes after it was chosen; `None` where none was.
        machine: From `lmopt.platform.machine`.
        versions: Distribution to version.
        texts: Where the texts come from, in words.
        without: Engines that had no part, and why.
        dtype: Type that weights were loaded in.
        device: Where it ran.
        seconds: Time of this call.
        finished: Whether nothing was left to try.
    """

    folder: Path
    source: str
    label: str
    best: Trial | None
    pareto: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    reasons: tuple[str, ...]
    constraints: Constraints
    objectives: tuple[str, ...]
    workload: Workload
    remeasured: Trial | None
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    texts: Mapping[str, str]
    without: Mapping[str, str]
    dtype: str
    device: str
    seconds: float
    finished: bool

    @property
    def artifact(self) -> Path | None:
        """Folder of the recommended artefact."""
        return None if self.best is None else self.folder / MODEL

    @property
    def deviation(self) -> float | None:
        """How far the remeasured time of a token lies from the predicted, as a share: 0.04 is 4 % slower."""
        if self.best is None or self.remeasured is None:
            return None
        predicted, found = (one.figures["token_p50_ms"] for one in (self.best, self.remeasured))
        return None if not predicted or found is None else found / predicted - 1

    @property
    def float_model(self) -> Trial | None:
        """The float model on the engine that takes it as it is, or the first float deployment that was measured."""
        floats = [one for one in self.trials if one.is_float and one.state == "measured"]
        return next((one for one in floats if one.exporter is None), floats[0] if floats else None)

    def replay(self, folder: str | Path, **options: Any) -> "Replay":
        """Make the recommended deployment again from its recipe, and measure it.

        Args:
            folder: Where to put it.
            **options: As for `lmopt.tuning.replay`.
        """
        from lmopt.tuning.replaying import replay

        return replay(self.folder / RESULT, folder, **options)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain data."""
        plain = asdict(self)
        plain |= {
            "lmopt_tune": _VERSION,
            "folder": str(self.folder),
            "best": self.best and self.best.name,
            "pareto": [one.name for one in self.pareto],
            "trials": [one.to_dict() for one in self.trials],
            "remeasured": self.remeasured and self.remeasured.to_dict(),
            "deviation": self.deviation,
        }
        found: dict[str, Any] = json.loads(json.dumps(plain, default=str))
        return found

    @classmethod
    def from_file(cls, path: str | Path) -> "TuneResult":
        """Read a `tune.json`, or that of an output folder.

        Raises:
            InputError: It is no such file.
        """
        path = Path(path)
        path = path / RESULT if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("lmopt_tune") != _VERSION:
                raise ValueError("another version of lmopt wrote it")
            content.pop("deviation")
            trials = {one["name"]: Trial.from_dict(one) for one in content["trials"]}
            again = content["remeasured"]
            return cls(
                **{
                    **content,
                    "folder": path.resolve().parent,
                    "best": trials.get(content["best"]),
                    "pareto": tuple(trials[name] for name in content["pareto"]),
                    "trials": tuple(trials.values()),
                    "reasons": tuple(content["reasons"]),
                    "constraints": Constraints(**content["constraints"]),
                    "objectives": tuple(content["objectives"]),
                    "workload": Workload(**content["workload"]),
                    "remeasured": None if again is None else Trial.from_dict(again),
                }
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no result of a search: {error}. Give the tune.json, or the output folder, of `lmopt tune`"
            ) from None

    def __str__(self) -> str:
        """Say what is recommended, and why."""
        head = "no deployment keeps every limit" if self.best is None else self.best.name
        return "\n".join([f"{self.label}: {head}", *(f"- {one}" for one in self.reasons)])

    def _repr_html_(self) -> str:
        """Show the recommendation, its picture and the best trials in a notebook."""
        from lmopt.tuning.report import style, table

        words = "".join(f"<li>{html.escape(one)}</li>" for one in self.reasons)
        head = "No deployment keeps every limit" if self.best is None else self.best.name
        picture = self.folder / "report.svg"
        drawn = inline_svg(picture.read_text(encoding="utf-8")) if picture.exists() else ""
        shown = self.pareto or [one for one in self.trials if one.state == "measured"]
        return (
            f'<div class="lmopt-tune">{style()}<h3>{html.escape(self.label)}: {html.escape(head)}</h3><ul>{words}</ul>'
            f"{drawn}{table(self, shown)}</div>"
        )


def inline_svg(text: str) -> str:
    """Cut a picture's XML declaration off, which has no place inside of HTML."""
    return text[text.index("<svg") :]


def kept_limits(result: TuneResult) -> list[tuple[str, str, str]]:
    """Name, value of the recommended deployment, and limit, of each limit."""
    figures = {} if result.best is None else result.best.figures
    return [
        (LABELS[name][0], show(name, figures.get(name)), show(name, limit))
        for name, limit in result.constraints.given().items()
    ]
