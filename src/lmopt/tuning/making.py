"""Compress and export once for all trials that share the result."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lmopt.artifact import is_artifact
from lmopt.tuning.jobs import CALIBRATION
from lmopt.tuning.plan import Plan
from lmopt.tuning.space import Candidate, Recipe, Route
from lmopt.tuning.work import WorkError

_JOBS: Final = "lmopt.tuning.jobs"
# Failures that say nothing of the work itself: it may be tried again.
AGAIN: Final = frozenset({"budget", "interrupted"})

Do = Callable[[str, Mapping[str, Any], str], dict[str, Any]]
"""Runs a job (`module:function`) on arguments; the third is the stage, for people and for the time it takes."""


class ScreenedError(Exception):
    """A cheap look was enough to put a candidate aside.

    Attributes:
        loss: What was measured of its quality, if anything.
        excesses: By how much limits are passed, for the sampler.
    """

    def __init__(
        self,
        reason: str,
        *,
        loss: Mapping[str, Any] | None = None,
        excesses: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(reason)
        self.loss = loss
        self.excesses = dict(excesses or {})


@dataclass(slots=True)
class Workshop:
    """Makes what trials run, each thing once, and remembers what failed.

    Attributes:
        plan: The search.
        do: Runs a job.
    """

    plan: Plan
    do: Do
    _records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def place(self, candidate: Candidate) -> str:
        """Make what a candidate runs, as far as it is not there, and say where it is.

        Raises:
            WorkError: It could not be made.
            ScreenedError: Its recipe loses too much on a few tokens.
        """
        recipe, route = candidate.recipe, candidate.route
        folder = self.plan.source if recipe.is_float else self._compressed(recipe)
        return folder if route.exporter is None else self._exported(folder, recipe, route)

    def look(self, recipe: Recipe) -> dict[str, Any]:
        """Compress by a recipe and give what it costs on a few tokens; see `jobs.compress`.

        Raises:
            WorkError: It could not be done.
        """
        plan = self.plan
        calibration = self._calibration() if recipe.calibrated else None
        return self._once(
            _slug("recipe", recipe.name, recipe.steps),
            "compress",
            f"compress: {recipe.name}",
            {
                "source": plan.source,
                "dtype": plan.dtype,
                "trust": plan.trust,
                "steps": [dict(step) for step in recipe.steps],
                "stored": recipe.stored,
                "calibration": calibration,
                "folder": str(plan.folder),
                "quick_tokens": plan.workload.quick_tokens,
                "keep": {
                    k: v for k, v in plan.limits.given().items() if k in ("perplexity_ratio", "kl_mean")
                },
            },
        )

    def looked(self, recipe: Recipe) -> dict[str, Any] | None:
        """Give what `look` has found, without doing it; `None` where it was not done, or failed."""
        record = self._record(_slug("recipe", recipe.name, recipe.steps))
        return record.get("result") if record else None

    def is_made(self, candidate: Candidate) -> bool:
        """Say whether a candidate only has to be measured."""
        route = candidate.route
        if route.exporter is None:
            return candidate.recipe.is_float or self.looked(candidate.recipe) is not None
        return is_artifact(self._folder(_export_slug(candidate.recipe, route)))

    def publishable(self, candidate: Candidate) -> Path:
        """Give the artefact of a candidate; the float model of an engine that takes it as it is is saved first."""
        place = Path(self.place(candidate))
        if is_artifact(place) or not candidate.recipe.is_float:
            return place
        plan = self.plan
        self._once(
            _slug("float"), "save_float", "save the model",
            {"source": plan.source, "dtype": plan.dtype, "trust": plan.trust},
        )  # fmt: skip
        return self._folder(_slug("float"))

    def _compressed(self, recipe: Recipe) -> str:
        found = self.look(recipe)
        if found["broken"]:
            raise ScreenedError(
                "; ".join(found["broken"]),
                loss=found["loss"],
                excesses=self.plan.limits.excesses(found["loss"]),
            )
        return str(self._folder(_slug("recipe", recipe.name, recipe.steps)))

    def _exported(self, source: str, recipe: Recipe, route: Route) -> str:
        slug = _export_slug(recipe, route)
        self._once(
            slug,
            "export",
            f"export {route.target}: {recipe.name}",
            {
                "source": source,
                "dtype": self.plan.dtype,
                "trust": self.plan.trust,
                "exporter": route.exporter,
                "exporter_target": route.target,
                "options": dict(route.options),
            },
        )
        return str(self._folder(slug))

    def fallback(self, candidate: Candidate) -> str:
        """Say why an export is not in the dialect that was asked for, `""` where it is."""
        if candidate.route.exporter is None:
            return ""
        record = self._record(_export_slug(candidate.recipe, candidate.route)) or {}
        reason = record.get("result", {}).get("fallback")
        return f"written in the portable dialect, because {reason}" if reason else ""

    def _calibration(self) -> str:
        plan = self.plan
        if plan.calibration is not None:
            return str(plan.calibration)
        written = plan.folder / CALIBRATION
        if not written.exists():
            self.do(
                f"{_JOBS}:write_calibration",
                {"source": plan.source, "dtype": plan.dtype, "trust": plan.trust, "folder": str(plan.folder)},
                "write calibration texts",
            )
        return str(written)

    def _once(self, slug: str, job: str, stage: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Do a job that makes a folder, unless its outcome is written down."""
        record = self._record(slug)
        if record is None:
            target = self._folder(slug)
            if target.exists():
                shutil.rmtree(target)  # of a process that was killed before it wrote its word
            try:
                result = self.do(f"{_JOBS}:{job}", {**arguments, "target": str(target)}, stage)
                record = {"result": result}
            except WorkError as failure:
                record = {"failed": str(failure), "kind": failure.kind}
                if failure.kind in AGAIN:
                    raise
            part = self.plan.folder / f"{slug}.json.part"
            part.write_text(json.dumps(record), encoding="utf-8")
            os.replace(part, self.plan.folder / f"{slug}.json")
        if "failed" in record:
            raise WorkError(record["kind"], f"{stage}: {record['failed']}")
        result = record["result"]
        return dict(result)

    def _record(self, slug: str) -> dict[str, Any] | None:
        if slug not in self._records:
            path = self.plan.folder / f"{slug}.json"
            if not path.exists():
                return None
            self._records[slug] = json.loads(path.read_text(encoding="utf-8"))
        return self._records[slug]

    def _folder(self, slug: str) -> Path:
        return self.plan.folder / slug


def _export_slug(recipe: Recipe, route: Route) -> str:
    return _slug("export", recipe.name, recipe.steps, route.exporter, route.target, dict(route.options))


def _slug(kind: str, *what: Any) -> str:
    text = json.dumps(what, sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}" if what else kind
