"""What the parity gate found, for people and for the manifest."""

import math
from dataclasses import dataclass
from typing import Any

from lmopt.evaluation.divergence import LogitsDifference
from lmopt.evaluation.tolerances import Tolerance


@dataclass(frozen=True, slots=True)
class CaseResult:
    """Numbers and verdict of one way of use.

    Attributes:
        case: Name of the case: `"decode"`, `"batch-left"`.
        difference: The numbers.
        failures: What is over the limit, with the number and the limit; empty where all is well.
        severity: How far the worst number is over its limit: at most 1 passes.
    """

    case: str
    difference: LogitsDifference
    failures: tuple[str, ...]
    severity: float

    @property
    def ok(self) -> bool:
        """Whether every limit holds."""
        return not self.failures

    @classmethod
    def judge(cls, case: str, difference: LogitsDifference, limits: Tolerance) -> "CaseResult":
        """Hold the numbers of a case against the limits."""
        d = difference
        failures = []
        severity = d.kl_mean / limits.kl_mean
        if d.positions == 0:
            failures.append("nothing was compared")
        if d.nonfinite:
            failures.append(f"NaN or infinity at {d.nonfinite} of {d.positions} positions")
        if not d.kl_mean <= limits.kl_mean:
            failures.append(f"mean KL {d.kl_mean:.2e} > {limits.kl_mean:.0e}")
        if limits.atol is not None:
            severity = max(severity, d.max_ratio)
            if not d.max_ratio <= 1.0:
                failures.append(
                    f"max abs error {d.max_abs:.2e}, {d.max_ratio:.3g} x the limit "
                    f"{limits.atol:.0e} + {limits.rtol:.0e} x |reference|"
                )
        # Rounded up, so that one miss in a short case is not a fault where the type allows misses.
        allowed = math.ceil(round((1.0 - limits.top1) * d.positions, 9))
        if d.top1_misses > allowed:
            severity = max(severity, (d.top1_misses + 1) / (allowed + 1))
            failures.append(
                f"top-1 {d.top1:.2%} < {limits.top1:.2%}, ties excused: "
                f"{d.top1_misses} misses at {d.positions} positions"
            )
        if d.nonfinite or not d.positions or math.isnan(severity):
            severity = math.inf
        return cls(case, difference, tuple(failures), severity)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Result of the parity gate.

    Attributes:
        candidate: Backend, device and compute type of the engine under test.
        tolerance: Limits that were applied.
        cases: One result a case.
        lengths: Prompt lengths that were used.
        ids: `"text"` or `"random"`: where the token ids came from.
        seed: Seed of random ids.
    """

    candidate: str
    tolerance: Tolerance
    cases: tuple[CaseResult, ...]
    lengths: tuple[int, ...]
    ids: str
    seed: int

    @property
    def ok(self) -> bool:
        """Whether every case passed; a report without cases has not."""
        return bool(self.cases) and all(case.ok for case in self.cases)

    @property
    def worst(self) -> CaseResult:
        """The case that is farthest over, or nearest to, its limits; failed ones come first."""
        return max(self.cases, key=lambda case: (not case.ok, case.severity))

    def rows(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Give a header and one row of text a case, for any table printer."""
        header = (
            "case",
            "positions",
            "max abs",
            "mean abs",
            "KL mean",
            "KL p99",
            "top-1",
            "raw top-1",
            "verdict",
        )
        body: list[tuple[str, ...]] = []
        for case in self.cases:
            d = case.difference
            body.append(
                (
                    case.case,
                    str(d.positions),
                    f"{d.max_abs:.1e}",
                    f"{d.mean_abs:.1e}",
                    f"{d.kl_mean:.1e}",
                    f"{d.kl_p99:.1e}",
                    f"{d.top1:.2%}",
                    f"{d.top1_raw:.2%}",
                    "ok" if case.ok else "FAILED",
                )
            )
        return header, body

    def lines(self) -> list[str]:
        """Give the table as lines of text, columns aligned."""
        header, body = self.rows()
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        return [
            "  ".join(
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (header, *body)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Give the report as plain numbers and strings for the manifest; no times, no paths."""
        return {
            "ok": self.ok,
            "candidate": self.candidate,
            "tolerance": self.tolerance.to_dict(),
            "lengths": list(self.lengths),
            "ids": self.ids,
            "seed": self.seed,
            "worst": self.worst.case if self.cases else None,
            "cases": {
                case.case: {"ok": case.ok, "failures": list(case.failures), **case.difference.to_dict()}
                for case in self.cases
            },
        }
