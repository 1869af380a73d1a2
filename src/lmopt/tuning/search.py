"""The search itself: float models first, then what the sampler wants to know, then the best once more."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmopt.errors import EngineError
from lmopt.tuning.choosing import choose
from lmopt.tuning.estimating import estimate
from lmopt.tuning.jobs import LOGITS, ROWS, artifact_bytes
from lmopt.tuning.limits import OBJECTIVES, show
from lmopt.tuning.making import AGAIN, ScreenedError, Workshop
from lmopt.tuning.plan import Plan
from lmopt.tuning.probe import Probe
from lmopt.tuning.space import Candidate, Recipe, Route
from lmopt.tuning.study import Memory
from lmopt.tuning.trials import Trial
from lmopt.tuning.work import Limits, Progress, Runner, WorkError

if TYPE_CHECKING:
    import optuna

_JOBS: Final = "lmopt.tuning.jobs"
# A float engine that is slower than another by this factor has nothing to win; a compressed one by the other.
_HOPELESS_FLOAT: Final = 5.0
_HOPELESS: Final = 1.5
# What calibration leaves of the loss of rounding to nearest: 0.42 and 0.43 of KL, 0.54 and 0.58 of the logarithm of the
# ratio in docs/results/2026-11-24-compression.md. Half of that, so that no recipe is put aside that could do it.
_CALIBRATED: Final = 0.25
_CONTENDERS: Final = 3
_MOST_POSTPONED: Final = 3
_SCATTER: Final = 1.25
_MOST_RESERVED: Final = 0.3


class Search:
    """One call's work on a study.

    Args:
        plan: What to search.
        memory: The study.
        runner: Runs pieces of work.
        budget_s: Seconds for this call.
        tell: Told of progress.
        probe: What the machine's memory gives, for a bound on speed; `None` sets none.
        clock: Seconds; for tests.
    """

    def __init__(
        self,
        plan: Plan,
        memory: Memory,
        runner: Runner,
        budget_s: float,
        tell: Progress,
        probe: Probe | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.workshop = Workshop(plan, self._do)
        self._memory = memory
        self._runner = runner
        self._budget_s = budget_s
        self._tell = tell
        self._probe = probe
        self._clock = clock
        self._began = clock()
        self._took: dict[str, list[float]] = defaultdict(list)
        self._stages: dict[str, float] = {}
        self._tried: set[str] = set()
        self._postponed = 0
        self.finished = False
        self._trials: dict[str, Trial] = {one.name: one for one in memory.trials()}

    @property
    def trials(self) -> list[Trial]:
        """Everything that is known."""
        return list(self._trials.values())

    def run(self) -> None:
        """Search until the budget is spent, or nothing is left to try.

        Raises:
            EngineError: The float model itself cannot be read.
        """
        self._prepare()
        space = self.plan.space
        for route in space.routes:
            self._attempt_new(Candidate(space.recipes[0], route, space.threads[0]), always=True)
        for candidate in self._openings():
            self._attempt_new(candidate)
        # What does not fit into the time that is left may be followed by something that does, but not for long.
        while self._left() > 0 and self._postponed < _MOST_POSTPONED:
            found = self._memory.next(space, self._known(), self._order())
            if found is None:
                self.finished = not any(one.kind in AGAIN for one in self.trials)
                break
            self._attempt(*found)
        self._confirm()

    def remeasure(self, trial: Trial, starts: int = 2) -> Trial:
        """Measure a trial in fresh processes once more, apart from what it was chosen by."""
        return self._again([trial], starts, fresh=True)[0]

    def publishable(self, trial: Trial) -> Path:
        """Give the artefact of a trial; making it, where that is left, may pass the budget."""
        self._budget_s = math.inf
        return self.workshop.publishable(self.candidate(trial))

    def candidate(self, trial: Trial) -> Candidate:
        """Find the point that a trial was made of."""
        return next(one for one in self.plan.space.candidates() if one.name == trial.name)

    def _left(self) -> float:
        """Seconds that may still be spent on trials."""
        return self._remaining() - self._reserve()

    def _remaining(self) -> float:
        return self._budget_s - (self._clock() - self._began)

    def _reserve(self) -> float:
        """Seconds kept for measuring the best once more."""
        usual = statistics.median(self._took["measure"] or [10.0])
        starts = self.plan.workload.starts
        return min(_MOST_RESERVED * self._budget_s, usual * (starts * _CONTENDERS + 2))

    def _do(
        self, call: str, arguments: Mapping[str, Any], stage: str, room: float | None = None
    ) -> dict[str, Any]:
        """Run a job within what is left of the budget, or within `room` seconds."""
        kind = call.partition(":")[2]
        room = self._left() if room is None else room
        if room <= 0 or min(self._took[kind], default=0.0) > room:
            raise WorkError("budget", f"not enough time was left ({max(0.0, room):.0f} s)")
        seconds = min(self.plan.trial_seconds, room)
        began = self._clock()
        self._tell(stage, 0, 1)
        try:
            result = self._runner(
                call,
                arguments,
                Limits(seconds, self.plan.memory_bytes),
                lambda what, done, total: self._tell(f"{stage}: {what}" if what else stage, done, total),
            )
        except WorkError as failure:
            if failure.kind == "time" and seconds < self.plan.trial_seconds:
                raise WorkError("budget", "the budget ended while it ran") from None
            raise
        finally:
            spent = self._clock() - began
            self._stages[kind] = self._stages.get(kind, 0.0) + spent
        self._took[kind].append(spent)
        return result

    def _prepare(self) -> None:
        plan = self.plan
        if (plan.folder / ROWS).exists() and (plan.folder / LOGITS).exists():
            return
        arguments = {
            "source": plan.source,
            "backend": plan.reference,
            "dtype": plan.dtype,
            "trust": plan.trust,
            "text": None if plan.text is None else str(plan.text),
            "score_tokens": plan.workload.score_tokens,
            "folder": str(plan.folder),
        }
        try:
            self._do(f"{_JOBS}:prepare", arguments, "read the float model")
        except WorkError as failure:
            raise EngineError(f"the float model of {plan.label} cannot be read: {failure}") from None

    def _openings(self) -> list[Candidate]:
        """What is worth knowing of any model, on the engine that runs its float form fastest."""
        space = self.plan.space
        floats = [one for one in self.trials if one.is_float and one.state == "measured"]
        if not floats:
            return []
        fastest = min(floats, key=lambda one: one.figures["token_p50_ms"] or float("inf"))
        same = [one for one in space.routes if (one.backend, one.target) == (fastest.backend, fastest.target)]
        found = []
        for recipe in space.recipes[1:]:
            knobs = recipe.knobs
            own = str(knobs["method"]).startswith("recipe ") or recipe.stored
            spread = (knobs.get("method"), knobs.get("bits"), knobs.get("group_size"), knobs.get("zero"))
            usual = (("rtn", 8, 32, "symmetric"), ("rtn", 4, 32, "asymmetric"), ("rtn", 4, 64, "symmetric"))
            # The head in 4 bits, too, for the smallest of the usual ones: it is a large part of a small model.
            heads = (8, 4) if spread == usual[1] else (8,)
            if own or (spread in usual and knobs.get("head") in heads):
                routes = [one for one in same if space.allows(recipe, one)]
                if routes:
                    most = max(routes, key=lambda one: len(one.options))
                    found.append(Candidate(recipe, most, space.threads[0]))
        return found

    def _known(self) -> dict[str, Mapping[str, float]]:
        """Points that need not be tried, with the limits that they pass."""
        found: dict[str, Mapping[str, float]] = {
            one.name: self.plan.limits.excesses(one.figures)
            for one in self.trials
            # What an earlier call had no time for is free again.
            if one.kind not in AGAIN or one.name in self._tried
        }
        for recipe in self.plan.space.recipes:
            looked = None if recipe.is_float else self.workshop.looked(recipe)
            if looked and looked["broken"]:
                excesses = self.plan.limits.excesses(looked["loss"])
                for route in self.plan.space.routes:
                    for threads in self.plan.space.threads:
                        found.setdefault(Candidate(recipe, route, threads).name, excesses)
        return found

    def _order(self) -> list[Candidate]:
        """All points, those that cost least to try first."""
        return sorted(
            self.plan.space.candidates(),
            key=lambda one: (
                not self.workshop.is_made(one),
                self.workshop.looked(one.recipe) is None and not one.recipe.is_float,
                one.recipe.calibrated,
                one.simplicity,
            ),
        )

    def _attempt_new(self, candidate: Candidate, *, always: bool = False) -> None:
        """Try a point, unless it is known or, but for float models, the time is over."""
        before = self._trials.get(candidate.name)
        fits = self.plan.space.allows(candidate.recipe, candidate.route)
        if (before is None or before.kind in AGAIN) and fits and (always or self._left() > 0):
            self._attempt(self._memory.asked(self.plan.space, candidate), candidate)

    def _attempt(self, trial: "optuna.Trial", candidate: Candidate) -> None:
        """Try a point and write down what became of it, whatever that is."""
        self._stages = {}
        self._tried.add(candidate.name)
        outcome = self._blank(candidate)
        excesses: Mapping[str, float] = {}
        values = None
        try:
            outcome = self._measured(candidate, outcome)
            excesses = self.plan.limits.excesses(outcome.figures)
            figures = [outcome.figures[OBJECTIVES[one]] for one in self.plan.objectives]
            if None not in figures:
                values = [float(one or 0.0) for one in figures]
        except ScreenedError as found:
            outcome = replace(outcome, state="screened", reason=str(found), loss=found.loss)
            excesses = found.excesses
        except WorkError as failure:
            state = "postponed" if failure.kind in AGAIN else "failed"
            self._postponed += state == "postponed"
            outcome = replace(outcome, state=state, reason=str(failure), kind=failure.kind)  # type: ignore[arg-type]
        outcome = replace(outcome, stages={name: round(spent, 2) for name, spent in self._stages.items()})
        self._memory.tell(trial, outcome, values, excesses)
        self._trials[outcome.name] = outcome

    def _blank(self, candidate: Candidate) -> Trial:
        recipe, route = candidate.recipe, candidate.route
        return Trial(
            name=candidate.name,
            recipe=recipe.name,
            steps=tuple(recipe.steps),
            stored=recipe.stored,
            backend=route.backend,
            exporter=route.exporter,
            target=route.target,
            options=dict(route.options),
            threads=candidate.threads,
            is_float=recipe.is_float,
            simplicity=candidate.simplicity,
            state="failed",
        )

    def _measured(self, candidate: Candidate, blank: Trial) -> Trial:
        recipe = candidate.recipe
        if not recipe.is_float:
            self._check_estimate(candidate)
            if recipe.calibrated:
                self._check_calibrated(recipe)
        place = self.workshop.place(candidate)
        loss = next(
            (one.loss for one in self.trials
             if one.state == "measured" and (one.place, one.backend) == (place, candidate.route.backend)),
            None,
        )  # fmt: skip
        result = self._do(
            f"{_JOBS}:measure",
            self._arguments(place, candidate.route, candidate.threads, quality=loss is None)
            | {"give_up_ms": self._give_up_ms(recipe)},
            f"measure: {candidate.name}",
        )
        size = artifact_bytes(place)
        if recipe.is_float and candidate.route.exporter is None and self.plan.shape is not None:
            size = self.plan.shape.bytes_after(()) or size
        notes = [*result["notes"], self.workshop.fallback(candidate)]
        outcome = replace(
            blank.with_speeds([result["speed"]]),
            state="measured",
            reason="; ".join(one for one in notes if one),
            peak_memory_bytes=result["peak_memory_bytes"],
            artifact_bytes=size,
            loss=loss or result["loss"],
            place=place,
        )
        if result["gave_up"]:
            words = show("token_p50_ms", outcome.figures["token_p50_ms"])
            outcome = replace(
                outcome, state="screened", loss=None,
                reason=f"a token takes {words} on a short probe, which is hopeless beside the float model's "
                f"{show('token_p50_ms', self._fastest_float_ms())}",
            )  # fmt: skip
        return outcome

    def _arguments(self, place: str, route: Route, threads: int, *, quality: bool) -> dict[str, Any]:
        plan = self.plan
        return {
            "place": place,
            "backend": route.backend,
            "device": plan.device,
            "dtype": plan.dtype if place == plan.source and plan.reference is None else "auto",
            "threads": threads if route.takes_threads else None,
            "trust": plan.trust,
            "workload": asdict(plan.workload),
            "folder": str(plan.folder) if quality else None,
            "give_up_ms": None,
        }

    def _check_estimate(self, candidate: Candidate) -> None:
        """Put a candidate aside whose files alone would pass a limit."""
        found = estimate(candidate, self.plan.shape, self._probe)
        if broken := self.plan.limits.broken(found):
            raise ScreenedError(
                f"estimated from the shapes of the weights, at least: {'; '.join(broken)}",
                excesses=self.plan.limits.excesses(found),
            )

    def _check_calibrated(self, recipe: Recipe) -> None:
        """Put a calibrated recipe aside where rounding to nearest in the same form says that it is not worth it."""
        knobs = {**recipe.knobs, "method": "rtn"}
        twin = next((one for one in self.plan.space.recipes if dict(one.knobs) == knobs), None)
        limit = self.plan.limits.perplexity_ratio
        if twin is None or limit is None:
            return
        found = self.workshop.look(twin)
        ratio = found["loss"]["perplexity_ratio"]
        lost, allowed = math.log(ratio) if math.isfinite(ratio) else math.inf, math.log(limit)
        told = f"rounding to nearest in this form has a perplexity ratio of {ratio:.3f}"
        if lost * _CALIBRATED > allowed:
            raise ScreenedError(
                f"{told} on {found['loss']['tokens']} tokens; calibration wins back about half of the loss "
                "(docs/results/2026-11-24-compression.md), which would not do",
                excesses={"perplexity_ratio": lost * _CALIBRATED - allowed},
            )
        if lost <= 2 * found["loss"]["perplexity_ratio_stderr"]:
            raise ScreenedError(
                f"{told}, which is as good as no loss: there is nothing that calibration could win back"
            )

    def _fastest_float_ms(self) -> float | None:
        times = [
            one.figures["token_p50_ms"] for one in self.trials if one.is_float and one.state == "measured"
        ]
        return min((one for one in times if one is not None), default=None)

    def _give_up_ms(self, recipe: Recipe) -> float | None:
        fastest = self._fastest_float_ms()
        if fastest is None or "latency" not in self.plan.objectives:
            return None  # a slow one may be what is wanted, where only size counts
        # Where no float model keeps the limits, a slower one that does is what is wanted.
        return fastest * (_HOPELESS_FLOAT if recipe.is_float or not self._float_would_do() else _HOPELESS)

    def _float_would_do(self) -> bool:
        return any(
            one.is_float and one.state == "measured" and not self.plan.limits.broken(one.figures)
            for one in self.trials
        )

    def _confirm(self) -> None:
        """Measure the best once more, in turn, in fresh processes, so that no lucky start is chosen.

        One that was lucky falls behind then, and the next comes to the front, which is measured again in its turn.
        """
        name = OBJECTIVES[self.plan.objectives[0]]
        more = self.plan.workload.starts - 1
        for _ in range(_CONTENDERS if more else 0):
            found = choose(self.trials, self.plan.limits, self.plan.objectives)
            if found.best is None or found.best.starts > 1 or self._remaining() <= 0:
                return
            best = found.best.figures[name] or 0.0
            near = [
                one
                for one in (found.best, *found.equals, *found.pareto)
                if (one.figures[name] or 0.0) <= best * _SCATTER and one.starts <= 1
            ]
            contenders = list({one.name: one for one in near}.values())[:_CONTENDERS]
            for trial in self._again(contenders, more, fresh=False):
                self._memory.confirm(trial)
                self._trials[trial.name] = trial

    def _again(self, trials: Sequence[Trial], starts: int, *, fresh: bool) -> list[Trial]:
        """Measure the speed of trials in turn."""
        speeds: dict[str, list[dict[str, Any]]] = {
            one.name: [] if fresh else [speed_of(one)] for one in trials
        }
        peaks = {one.name: one.peak_memory_bytes or 0 for one in trials}
        for _ in range(starts):
            for one in trials:
                if self._remaining() <= 0 and not fresh:
                    break
                try:
                    result = self._do(
                        f"{_JOBS}:measure",
                        self._arguments(one.place, self.candidate(one).route, one.threads, quality=False),
                        f"measure again: {one.name}",
                        self.plan.trial_seconds if fresh else self._remaining(),
                    )
                except WorkError:
                    continue  # what is known of it stays
                speeds[one.name].append(result["speed"])
                peaks[one.name] = max(peaks[one.name], result["peak_memory_bytes"])
        return [
            replace(
                one.with_speeds(speeds[one.name]) if speeds[one.name] else one,
                peak_memory_bytes=peaks[one.name],
            )
            for one in trials
        ]


def speed_of(trial: Trial) -> dict[str, Any]:
    """Give a trial's figures of speed in the form in which a measurement has them."""
    names = ("token_p50_ms", "token_p95_ms", "first_token_ms", "decode_tokens_per_s", "prefill_tokens_per_s")
    return {name: asdict(figure) for name in names if (figure := getattr(trial, name)) is not None}
