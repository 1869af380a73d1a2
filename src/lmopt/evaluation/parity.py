"""The parity gate: does an engine compute what the original model computes, in every way of use?

`measure` runs a candidate through cached, padded, batched and reordered use and compares its logits
with those of the honest oracle: one full, unpadded, uncached forward pass of each row. `require`
turns a failed report into `ParityError`, so that nothing that failed is published.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lmopt.contracts import Engine
from lmopt.errors import ParityError, ShapeError
from lmopt.evaluation.cases import CASES, Seen, greedy, make_rows
from lmopt.evaluation.divergence import DifferenceMeter
from lmopt.evaluation.report import CaseResult, ParityReport
from lmopt.evaluation.tolerances import Tolerance, tolerance_for
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.types import FloatArray, IntArray, ModelFacts

Reference: TypeAlias = Callable[[IntArray], FloatArray]
"""From `(sequence,)` ids to `(sequence, vocab)` float32 logits, by a full forward without cache."""

Rounding: TypeAlias = Callable[[IntArray], FloatArray | None]
"""From `(sequence,)` ids to `(sequence,)` float32: the largest difference that the order of
floating-point operations alone makes to the reference's logits at each position; `None` where the
model offers no second order."""

# Two sums in float32 that differ only by their order differ by random walks of like size: three times
# the one that was seen covers another engine's order. The cap keeps a model whose own cache is broken
# from excusing everything.
_ROUNDING_SHARE = 3.0
_MOST_SLACK = 10.0


def measure(
    reference: Reference,
    candidate: Engine,
    *,
    facts: ModelFacts | None = None,
    dtype: str = "float32",
    prompts: Sequence[Sequence[int]] | None = None,
    tolerance: Tolerance | None = None,
    seed: int = 0,
    lengths: Sequence[int] = (1, 2, 7, 33, 130),
    new_tokens: int = 32,
    rounding: Rounding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Compare an engine with its reference in all cases of use.

    The default sizes cost the reference about 380 tokens and the engine about 1,600, 80 of them
    decoding steps.

    Args:
        reference: Logits of the original model; see `engine_reference` for one made of an engine.
        candidate: Engine under test.
        facts: Facts of the model; the candidate's own where `None`.
        dtype: Row of the tolerance table, where `tolerance` is `None`.
        prompts: Token ids of real text to test with; `None` takes seeded random ids.
        tolerance: Limits, in place of the table's.
        seed: Seed of the random ids.
        lengths: Prompt lengths, cut down to the context.
        new_tokens: Tokens of the greedy case, at least 1.
        rounding: What the order of operations does to the reference itself. Positions at which a
            model is badly conditioned (byte fragments, attention sinks) then get three times that,
            at most ten times `atol`, on top of the limit; the divergence and top-1 limits stay.
        progress: Called with the number of cases done and their total.

    Returns:
        A report with numbers and verdict for each case.

    Raises:
        UnsupportedOptionError: No tolerance is known for `dtype`.
        UnsupportedError: The context is shorter than 4 tokens.
        InputError: The prompts or lengths are empty or malformed.
        EngineError: The candidate returned logits of a wrong shape.
        ShapeError: The reference did.
    """
    facts = facts or candidate.facts
    limits = tolerance or tolerance_for(dtype)
    rows = make_rows(facts, prompts, lengths, seed)
    engine = for_unequal_rows(candidate)
    oracle = _Oracle(reference, rounding, facts, limits)
    expected = [oracle.judgement(row.ids) for row in rows]
    total = len(CASES) + 1
    results = []
    for number, (name, run) in enumerate(CASES.items()):
        _tell(progress, number, total)
        meter = DifferenceMeter(limits)
        for seen in run(engine, rows):
            expected[seen.row].judge(meter, seen)
        results.append(CaseResult.judge(name, meter.result(), limits))

    _tell(progress, total - 1, total)
    meter = DifferenceMeter(limits)
    read, steps = greedy(engine, rows[:4], max(1, new_tokens))
    for seen in steps:
        oracle.judgement(read[seen.row]).judge(meter, seen)
    results.append(CaseResult.judge("greedy", meter.result(), limits))
    _tell(progress, total, total)

    says = candidate.report()
    return ParityReport(
        candidate=f"{says.backend} {says.device} {says.dtype}",
        tolerance=limits,
        cases=tuple(results),
        lengths=tuple(row.prompt for row in rows),
        ids="random" if prompts is None else "text",
        seed=seed,
    )


def require(
    report: ParityReport, *, what: str, locate: str = "lmopt compare REFERENCE CANDIDATE --bisect"
) -> None:
    """Let a passed report through and stop at a failed one.

    Args:
        report: From `measure`.
        what: What was checked, for the message: `"the ONNX export of smollm2-135m"`.
        locate: Command that finds the first operator that differs.

    Raises:
        ParityError: The report failed; its `report` attribute holds the numbers.
    """
    if report.ok:
        return
    worst = report.worst
    failed = [case.case for case in report.cases if not case.ok]
    table = "\n".join(report.lines())
    raise ParityError(
        f"{what} does not compute what its reference computes. Worst case {worst.case!r}: "
        f"{'; '.join(worst.failures)}. Failed: {', '.join(failed)}; {len(failed)} of "
        f"{len(report.cases)} cases ({report.candidate}, limits of {report.tolerance.name}).\n"
        f"{table}\nFind the first operator that differs: {locate}",
        report,
    )


def engine_reference(engine: Engine) -> Reference:
    """Make a reference of an engine: a fresh state and one call for each row."""

    def logits(ids: IntArray) -> FloatArray:
        state = engine.begin(1, capacity=len(ids))
        result, _ = engine.forward(ids[None, :], np.array([len(ids)], dtype=np.int64), state)
        return np.asarray(result[0])

    return logits


class _Expected:
    """What the reference says of a row, and, once that is asked for, how sure it is of each position."""

    def __init__(self, logits: FloatArray, uncertainty: Callable[[], FloatArray | None], most: float) -> None:
        self._logits = logits
        self._uncertainty = uncertainty
        self._most = most

    def judge(self, meter: DifferenceMeter, seen: Seen) -> None:
        end = seen.start + len(seen.logits)
        meter.update(self._logits[seen.start : end], seen.logits, lambda: self._slack[seen.start : end])

    @cached_property
    def _slack(self) -> NDArray[np.float64]:
        uncertain = self._uncertainty()
        if uncertain is None:
            return np.zeros(len(self._logits))
        return np.minimum(_ROUNDING_SHARE * uncertain.astype(np.float64), self._most)


@dataclass(frozen=True, slots=True)
class _Oracle:
    """The reference together with its uncertainty."""

    reference: Reference
    rounding: Rounding | None
    facts: ModelFacts
    limits: Tolerance

    def judgement(self, ids: IntArray) -> _Expected:
        logits = self.reference(ids)
        if logits.shape != (len(ids), self.facts.vocab_size):
            raise ShapeError(
                f"the reference gave logits of shape {logits.shape} for {len(ids)} tokens; "
                f"expected {(len(ids), self.facts.vocab_size)}: one row for each token, unpadded."
            )
        rounding = self.rounding or (lambda ids: None)
        return _Expected(logits, lambda: rounding(ids), _MOST_SLACK * (self.limits.atol or 0.0))


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
