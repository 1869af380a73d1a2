"""Which of the measured deployments to recommend, and why, in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from lmopt.tuning.limits import LABELS, OBJECTIVES, Constraints, show
from lmopt.tuning.trials import Trial, dominates

_WORDS = {
    "latency": "faster a token",
    "size": "smaller",
    "quality": "closer to the original",
    "memory": "leaner in memory",
    "first_token": "faster to the first token",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What came out of comparing.

    Attributes:
        best: The recommended trial, `None` where none keeps the limits.
        pareto: Trials that keep the limits and that no other beats in every objective, the first objective's best
            first.
        equals: Trials that could not be told from the best in the objectives, and lost by being less simple.
        reasons: Why, in sentences.
    """

    best: Trial | None
    pareto: tuple[Trial, ...]
    equals: tuple[Trial, ...]
    reasons: tuple[str, ...]


def choose(trials: Sequence[Trial], limits: Constraints, objectives: Sequence[str]) -> Choice:
    """Choose among measured trials.

    Those that keep every limit are compared by the first objective; what cannot be told from the best there, within
    the noise of both, by the second, and so on; what is equal in all of them by simplicity. A compressed model that
    is slower than a float model that would also do is not in the choice at all.

    Args:
        trials: All trials.
        limits: What must be kept.
        objectives: Names, the one that counts most first.
    """
    measured = [one for one in trials if one.state == "measured"]
    fitting = [one for one in measured if _finite(one) and not limits.broken(one.figures)]
    floats = [one for one in fitting if one.is_float]
    fastest = min(floats, key=lambda one: _value(one, "token_p50_ms"), default=None)
    slower = [one for one in fitting if fastest is not None and not one.is_float and _is_slower(one, fastest)]
    eligible = [one for one in fitting if one not in slower]
    if not eligible:
        return Choice(None, (), (), _no_reasons(trials, measured, limits))
    names = [OBJECTIVES[one] for one in objectives]
    rest = eligible
    for name in names:
        rest = _within_noise(rest, name)
    best = min(rest, key=lambda one: (one.simplicity, *(_value(one, name) for name in names)))
    points = {id(one): [_value(one, name) for name in names] for one in eligible}
    pareto = [
        one for one in eligible
        if not any(dominates(points[id(other)], points[id(one)]) for other in eligible)
    ]  # fmt: skip
    pareto.sort(key=lambda one: points[id(one)])
    equals = tuple(one for one in rest if one is not best)
    reasons = _reasons(best, trials, measured, fastest, equals, slower, limits, objectives)
    return Choice(best, tuple(pareto), equals, reasons)


def _within_noise(trials: Sequence[Trial], name: str) -> list[Trial]:
    """Keep those that cannot be told from the one with the least figure."""
    least = min(trials, key=lambda one: _value(one, name))
    floor = _value(least, name)
    return [
        one for one in trials
        if _value(one, name) <= floor * (1 + max(one.noise(name), least.noise(name)))
    ]  # fmt: skip


def _is_slower(one: Trial, than: Trial) -> bool:
    name = "token_p50_ms"
    return _value(one, name) > _value(than, name) * (1 + max(one.noise(name), than.noise(name)))


def _finite(one: Trial) -> bool:
    return not (one.loss or {}).get("nonfinite")


def _value(one: Trial, name: str) -> float:
    value = one.figures[name]
    return float("inf") if value is None else float(value)


def _reasons(
    best: Trial,
    trials: Sequence[Trial],
    measured: Sequence[Trial],
    fastest: Trial | None,
    equals: Sequence[Trial],
    slower: Sequence[Trial],
    limits: Constraints,
    objectives: Sequence[str],
) -> tuple[str, ...]:
    found = []
    kept = [
        f"{LABELS[name][0]} {show(name, best.figures[name])} (limit {show(name, limit)})"
        for name, limit in limits.given().items()
    ]
    found.append(f"It keeps every limit: {'; '.join(kept)}.")
    base = next((one for one in measured if one.is_float and one.exporter is None), None)
    for other, what in ((base, "the float model as it is"), (fastest, "the fastest float deployment")):
        if other is None or other is best or (what.startswith("the fastest") and other is base):
            continue
        speed = _value(other, "token_p50_ms") / _value(best, "token_p50_ms")
        size = _value(other, "artifact_bytes") / _value(best, "artifact_bytes")
        found.append(
            f"A token takes {show('token_p50_ms', best.figures['token_p50_ms'])} against "
            f"{show('token_p50_ms', other.figures['token_p50_ms'])} of {what} ({other.name}): {speed:.1f}x; its files "
            f"{show('artifact_bytes', best.figures['artifact_bytes'])} against "
            f"{show('artifact_bytes', other.figures['artifact_bytes'])}: {size:.1f}x smaller."
        )
    found.append(
        f"What counted: {', then '.join(_WORDS[one] for one in objectives)}; figures within their noise are equal."
    )
    if equals:
        found.append(
            f"{_list(equals)} cannot be told from it within the noise, and "
            f"{'is' if len(equals) == 1 else 'are'} less simple."
        )
    if best.is_float:
        tried = any(not one.is_float for one in measured)
        found.append(
            "Nothing that was compressed does better within the limits, so the float model stays as it is."
            if tried
            else "No compressed deployment was measured yet, so this says nothing of what compression would bring."
        )
    if slower:
        found.append(f"Slower than the float model, so never recommended: {_list(slower)}.")
    found.append(_count(trials))
    return tuple(found)


def _no_reasons(trials: Sequence[Trial], measured: Sequence[Trial], limits: Constraints) -> tuple[str, ...]:
    found = ["No deployment keeps every limit."]
    if measured:
        nearest = min(
            measured, key=lambda one: sum(max(0.0, x) for x in limits.excesses(one.figures).values())
        )
        found.append(f"The nearest is {nearest.name}: {'; '.join(limits.broken(nearest.figures))}.")
    found.append(_count(trials))
    return tuple(found)


def _count(trials: Sequence[Trial]) -> str:
    def count(state: str) -> int:
        return sum(one.state == state for one in trials)

    return (
        f"Of {len(trials)} deployments that were looked at, {count('measured')} were measured, {count('screened')} put "
        f"aside by a cheap look, {count('failed')} failed, and {count('postponed')} were left for want of time."
    )


def _list(trials: Sequence[Trial], most: int = 3) -> str:
    named = [f"{one.name} ({show('token_p50_ms', one.figures['token_p50_ms'])})" for one in trials[:most]]
    words = ", ".join(named)
    return words + (f" and {len(trials) - most} more" if len(trials) > most else "")
