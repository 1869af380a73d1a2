"""A search's memory on disk: optuna's study, from which an interrupted search goes on."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmopt.errors import JobMismatchError, NotInstalledError
from lmopt.registry import pip_line
from lmopt.spec import Requirement
from lmopt.tuning.space import Candidate, Space
from lmopt.tuning.trials import Trial

if TYPE_CHECKING:
    import optuna

_JOURNAL: Final = "study.journal"
_SETTINGS: Final = "settings.json"
_TRIAL: Final = "trial"
_CONFIRMED: Final = "confirmed"
_NAME: Final = "lmopt"
# Draws that may fall on points that are known already before the next one is simply taken in order; where more
# points are known than this share, draws are not worth their time.
_PATIENCE: Final = 6
_MOSTLY_KNOWN: Final = 0.8
_RANDOM_FIRST: Final = 6


def require_optuna() -> None:
    """Refuse without the packages that a search needs.

    Raises:
        NotInstalledError: With the pip line.
    """
    missing = [name for name in ("optuna", "matplotlib") if not Requirement(name, "").is_met()]
    if missing:
        tune = '"lmopt[tune]"'
        raise NotInstalledError(
            f"a search needs {' and '.join(missing)}, which this Python lacks: {pip_line(tune)}"
        )


class Memory:
    """The study on disk.

    Args:
        folder: Folder of the study.
        settings: What makes this search this search; plain data.
        objectives: Their number is that of the study's directions.
        seed: Of the sampler.

    Raises:
        JobMismatchError: The folder holds another search.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], objectives: Sequence[str], seed: int
    ) -> None:
        import optuna

        _check(folder / _SETTINGS, settings)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        from optuna.storages.journal import JournalFileBackend

        backend = JournalFileBackend(str(folder / _JOURNAL))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # parts of optuna call themselves experimental
            self._study = optuna.create_study(
                storage=optuna.storages.JournalStorage(backend),
                study_name=_NAME,
                sampler=optuna.samplers.TPESampler(
                    multivariate=True, group=True, n_startup_trials=_RANDOM_FIRST, seed=seed
                ),
                directions=["minimize"] * len(objectives),
                load_if_exists=True,
            )
        self._fail_unfinished()

    def trials(self) -> list[Trial]:
        """What is known, in the order in which it was found out; a later word on a point replaces an earlier one."""
        found: dict[str, Trial] = {}
        for one in self._study.get_trials(deepcopy=False):
            if _TRIAL in one.user_attrs:
                trial = Trial.from_dict(one.user_attrs[_TRIAL])
                found[trial.name] = trial
        for content in self._study.user_attrs.get(_CONFIRMED, {}).values():
            found[content["name"]] = Trial.from_dict(content)
        return list(found.values())

    def confirm(self, trial: Trial) -> None:
        """Write down what more was measured of a point that is known."""
        before = self._study.user_attrs.get(_CONFIRMED, {})
        now = json.loads(json.dumps(trial.to_dict()))
        self._study.set_user_attr(_CONFIRMED, {**before, trial.name: now})

    def asked(self, space: Space, wanted: Candidate) -> "optuna.Trial":
        """Open a trial for a point that is wanted."""
        self._study.enqueue_trial(space.answers(wanted))
        trial = self._study.ask()
        space.suggest(trial.suggest_categorical)
        return trial

    def next(
        self, space: Space, known: Mapping[str, Mapping[str, float]], order: Sequence[Candidate]
    ) -> "tuple[optuna.Trial, Candidate] | None":
        """Let the sampler choose a point that is not known yet.

        Args:
            space: Where to look.
            known: Name of each point that need not be tried to its excesses over limits, which are told to the
                sampler.
            order: Points that are taken in turn when the sampler keeps falling on known ones.

        Returns:
            An open trial and its point; `None` where every point is known.
        """
        import optuna

        unknown = [one for one in order if one.name not in known]
        draws = _PATIENCE if len(unknown) > (1 - _MOSTLY_KNOWN) * len(order) else 0
        for _ in range(draws):
            trial = self._study.ask()
            found = space.suggest(trial.suggest_categorical)
            if found is not None and found.name not in known:
                return trial, found
            for name, excess in (known[found.name] if found is not None else {"impossible": 1.0}).items():
                trial.set_constraint(name, min(excess, 1e6))
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return (self.asked(space, unknown[0]), unknown[0]) if unknown else None

    def tell(
        self,
        trial: "optuna.Trial",
        outcome: Trial,
        values: Sequence[float] | None,
        excesses: Mapping[str, float],
    ) -> None:
        """Write down what became of a point.

        Args:
            trial: From `asked` or `next`.
            outcome: What is known now.
            values: Objectives, where all were measured.
            excesses: By how much limits are passed, for the sampler.
        """
        import optuna

        trial.set_user_attr(_TRIAL, json.loads(json.dumps(outcome.to_dict())))
        for name, excess in excesses.items():
            trial.set_constraint(name, min(excess, 1e6))
        if values is not None:
            self._study.tell(trial, list(values))
        elif outcome.state == "screened":
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def _fail_unfinished(self) -> None:
        """Close trials that a killed process left open; their points are free again."""
        import optuna

        states = optuna.trial.TrialState
        for _ in self._study.get_trials(deepcopy=False, states=(states.WAITING,)):
            self._study.ask()  # takes it off the queue
        for one in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            self._study.tell(one.number, state=states.FAIL)


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    """Hold settings against those of the study in the folder, or write them down."""
    plain = json.loads(json.dumps(settings, sort_keys=True, default=str))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(key for key in {*before, *plain} if before.get(key) != plain.get(key))
        if other:
            raise JobMismatchError(
                f"{path.parent} holds another search: {other[0]} was {before.get(other[0])!r} and is now "
                f"{plain.get(other[0])!r}. Give another output folder, or remove this one: rm -r {path.parent}"
            )
        return
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)
