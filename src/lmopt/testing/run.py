"""Run the conformance kit, with pytest or without."""

import textwrap
import unittest
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmopt.errors import ConformanceError
from lmopt.testing.plan import PlannedCheck, plan
from lmopt.testing.workshop import MODELS, Workshop, kept

Verdict = Literal["passed", "failed", "not run", "failed as expected", "passed unexpectedly"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one check.

    Attributes:
        check: The check.
        verdict: What became of it.
        note: Error, or why it did not run.
    """

    check: PlannedCheck
    verdict: Verdict
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the backend may be called conforming in spite of this outcome."""
        return self.verdict not in ("failed", "passed unexpectedly")


@dataclass(frozen=True, slots=True)
class ConformanceReport:
    """Every outcome for one backend; `str()` gives a table.

    Attributes:
        backend: Name of the backend.
        outcomes: One a check and case, in the order of running.
    """

    backend: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and nothing that should have failed passed."""
        return all(outcome.ok for outcome in self.outcomes)

    def __str__(self) -> str:
        """Lay out one line a check: how many cases passed, and every one that did not."""
        names = list(dict.fromkeys(outcome.check.name for outcome in self.outcomes))
        width = max(map(len, names), default=0)
        lines = [f"Conformance of backend {self.backend!r}"]
        for name in names:
            of_name = [outcome for outcome in self.outcomes if outcome.check.name == name]
            counts = Counter(outcome.verdict for outcome in of_name)
            summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
            lines.append(f"  {name:<{width}}  {summary}")
            notes: dict[str, list[str]] = {}
            for outcome in of_name:
                if outcome.note:
                    # One line each: an exporter's error can fill a screen, and pytest shows it whole.
                    note = textwrap.shorten(outcome.note.partition("\n")[0], 240)
                    notes.setdefault(f"{outcome.verdict}: {note}", []).append(outcome.check.case)
            lines += [f"      {', '.join(cases)}: {note}" for note, cases in notes.items()]
        total = Counter(outcome.verdict for outcome in self.outcomes)
        lines.append("  total: " + ", ".join(f"{count} {verdict}" for verdict, count in total.items()))
        return "\n".join(lines)


def check_backend(
    backend: str,
    *,
    models: Sequence[str] = tuple(MODELS),
    devices: Sequence[str] | None = None,
    dialects: Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> ConformanceReport:
    """Run every check that a backend's capabilities call for; needs torch and onnx, not pytest.

    Args:
        backend: Name of the backend.
        models: Tiny models to run, of `lmopt.testing.models`.
        devices: Devices to run on; those declared by the spec where `None`.
        dialects: Dialects to run, of the exporters' targets; all where `None`.
        expected_failures: Check to reason; see `lmopt.testing.plan.plan`. An expected failure that
            passes is a failure.

    Returns:
        All outcomes; print it for a table.

    Raises:
        ConformanceError: A rule is broken; the message is the table.
        PluginError: The backend's spec cannot be loaded.
    """
    with Workshop() as workshop:
        planned = plan(
            backend,
            models=models,
            devices=devices,
            dialects=dialects,
            expected_failures=expected_failures,
            workshop=workshop,
        )
        report = ConformanceReport(backend, tuple(run_check(check) for check in planned))
    if not report.ok:
        raise ConformanceError(str(report))
    return report


def run_check(check: PlannedCheck) -> Outcome:
    """Run one check and say what became of it."""
    try:
        check()
    except unittest.SkipTest as reason:
        return Outcome(check, "not run", str(reason))
    except Exception as error:
        note = f"{type(error).__name__}: {error}"
        return Outcome(check, "failed as expected" if check.expected_failure else "failed", note)
    if check.expected_failure:
        return Outcome(check, "passed unexpectedly", f"expected to fail: {check.expected_failure}")
    return Outcome(check, "passed")


def parametrize_backend_checks(
    backend: str,
    *,
    models: Sequence[str] = tuple(MODELS),
    devices: Sequence[str] | None = None,
    dialects: Sequence[str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> Callable[[Any], Any]:
    """Turn a test function of one argument `check` into one test a check and case, for pytest.

    The models are those of `lmopt.testing.workshop.kept`, each written once a process.

    Args:
        backend: Name of the backend.
        models: As in `check_backend`.
        devices: As in `check_backend`.
        dialects: As in `check_backend`.
        expected_failures: As in `check_backend`; such tests are strict `xfail`s.

    Returns:
        A decorator.

    Example:
        ```python
        @parametrize_backend_checks("numpy")
        def test_contract(check):
            check()
        ```
    """
    import pytest

    planned = plan(
        backend,
        models=models,
        devices=devices,
        dialects=dialects,
        expected_failures=expected_failures,
        workshop=kept(),
    )
    parameters = []
    for check in planned:
        reason = check.expected_failure
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        parameters.append(pytest.param(check, id=check.id, marks=marks))
    return pytest.mark.parametrize("check", parameters)
