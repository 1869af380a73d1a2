"""The parity gate: does an engine compute what the original model computes, in every way of use?

`measure` runs a candidate through cached, padded, batched and reordered use and compares its logits
with those of the honest oracle: one full, unpadded, uncached forward pass of each row. `require`
turns a failed report into `ParityError`, so that nothing that failed is published.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lmopt.contracts import Engine
from lmopt.errors import ParityError, ShapeError
from lmopt.evaluation.cases import Row, Seen, cases_for, encoded, greedy, make_rows
from lmopt.evaluation.divergence import DifferenceMeter
from lmopt.evaluation.report import CaseResult, ParityReport
from lmopt.evaluation.shelf import Shelf
from lmopt.evaluation.tolerances import Tolerance, tolerance_for
from lmopt.generation.cohorts import for_unequal_rows
from lmopt.generation.sources import begin
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts

Reference: TypeAlias = Callable[..., FloatArray]
"""From `(sequence,)` ids, and for encoder-decoders the source before them, to `(sequence, vocab)` float32 logits, by
a full forward without cache."""

Encoded: TypeAlias = Callable[[AnyArray], Mapping[str, AnyArray]]
"""From a source to what a decoder holds of it, by the names of `lmopt.contracts.SupportsEncoder.encoded`, each with a
first axis of size 1."""

Rounding: TypeAlias = Callable[..., FloatArray | None]
"""From `(sequence,)` ids, and for encoder-decoders the source before them, to `(sequence,)` float32: the largest
difference that the order of floating-point operations alone makes to the reference's logits at each position; `None`
where the model offers no second order."""

# Two sums in float32 that differ only by their order differ by random walks of like size: three times
# the one that was seen covers another engine's order. One walk may end where it began, and the first
# piece of a row is read as the whole row is, so no position counts as more certain than half of those
# of the longest row. The cap keeps a model whose own cache is broken from excusing everything.
_ROUNDING_SHARE = 3.0
_MOST_SLACK = 10.0
_PIECE = 7


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
            model is badly conditioned (byte fragments, attention sinks) then get three times that, or
            three times the median over the longest row where that is more, at most ten times `atol`,
            on top of the limit; the divergence and top-1 limits stay.
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
    examination = Examination(
        reference,
        facts=facts or candidate.facts,
        dtype=dtype,
        prompts=prompts,
        tolerance=tolerance,
        seed=seed,
        lengths=lengths,
        new_tokens=new_tokens,
        rounding=rounding,
        progress=progress,
    )
    examination.run(candidate)
    return examination.report()


class Examination:
    """`measure` in three steps, so that reference and candidate need not be in memory together.

    The reference is asked when the object is made, then only the candidate by `run`, then only the
    reference, and rarely, by `report`. Between the steps either may give its memory back.

    Args:
        reference: As for `measure`.
        facts: Facts of the model.
        dtype: As for `measure`.
        prompts: As for `measure`.
        tolerance: As for `measure`.
        seed: As for `measure`.
        lengths: As for `measure`.
        new_tokens: As for `measure`.
        rounding: As for `measure`.
        progress: As for `measure`.
        sources: For encoder-decoders: what is read before the rows; `None` draws some.
        encoded: For encoder-decoders: what the reference holds of a source. The case `"encoder"` compares it,
            in units of its largest value.

    Raises:
        UnsupportedOptionError, UnsupportedError, InputError, ShapeError: As `measure`.
        DiskFullError: The system's folder for temporary files cannot hold the reference's logits.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        facts: ModelFacts,
        dtype: str = "float32",
        prompts: Sequence[Sequence[int]] | None = None,
        tolerance: Tolerance | None = None,
        seed: int = 0,
        lengths: Sequence[int] = (1, 2, 7, 33, 130),
        new_tokens: int = 32,
        rounding: Rounding | None = None,
        progress: Callable[[int, int], None] | None = None,
        sources: Sequence[AnyArray] | None = None,
        encoded: Encoded | None = None,
    ) -> None:
        self._limits = tolerance or tolerance_for(dtype)
        self._cases = cases_for(facts)
        self._rows = make_rows(facts, prompts, lengths, seed, sources)
        self._encoded: dict[int, Mapping[str, AnyArray]] = {}
        if encoded is not None:
            self._encoded = {row.number: encoded(row.source) for row in self._rows if row.source is not None}
        longest = max(self._rows, key=lambda row: len(row.ids))
        self._oracle = _Oracle(reference, rounding, _median(rounding, longest), facts, self._limits)
        self._shelf = Shelf(sum(len(row.ids) for row in self._rows), facts.vocab_size)
        for row in self._rows:
            self._shelf.put(row.number, self._oracle.logits(row.ids, row))
        self._new_tokens = max(1, new_tokens)
        self._progress = progress
        self._ids = "random" if prompts is None else "text"
        self._seed = seed
        self._candidate = ""
        self._meters: dict[str, DifferenceMeter] = {}
        self._greedy: tuple[list[IntArray], list[Seen]] = ([], [])

    def run(self, candidate: Engine) -> None:
        """Take the candidate through every case; afterwards it is no longer needed.

        Args:
            candidate: Engine under test.

        Raises:
            EngineError: It returned logits of a wrong shape.
        """
        engine = for_unequal_rows(candidate)
        slacks = {row.number: self._oracle.slack(row.ids, row) for row in self._rows}
        vocab = candidate.facts.vocab_size
        self._compare_encoded(candidate)
        for number, (name, case) in enumerate(self._cases.items()):
            self._tell(number)
            meter = self._meters[name] = DifferenceMeter(self._limits)
            for seen in case.run(engine, case.choose(self._rows, vocab)):
                expected = self._shelf.read(seen.row, seen.start, len(seen.logits))
                _judge(meter, expected, seen, slacks[seen.row])
                # Logits are the largest arrays by far: none is to live on during the next call.
                del seen, expected
        self._tell(len(self._cases))
        self._greedy = greedy(engine, self._rows[:4], self._new_tokens)
        says = candidate.report()
        self._candidate = f"{says.backend} {says.device} {says.dtype}"

    def report(self) -> ParityReport:
        """Let the reference judge the candidate's own tokens and what is in doubt.

        Returns:
            Numbers and verdict for each case.

        Raises:
            ShapeError: The reference returned logits of a wrong shape.
        """
        meter = self._meters["greedy"] = DifferenceMeter(self._limits)
        read, steps = self._greedy
        for seen in steps:
            ids, row = read[seen.row], self._rows[seen.row]
            expected = self._oracle.logits(ids, row)[seen.start : seen.start + len(seen.logits)]
            _judge(meter, expected, seen, self._oracle.slack(ids, row))
        cases = [CaseResult.judge(name, one.result(), self._limits) for name, one in self._meters.items()]
        self._tell(len(self._cases) + 1)
        return ParityReport(
            candidate=self._candidate,
            tolerance=self._limits,
            cases=tuple(cases),
            lengths=tuple(row.prompt for row in self._rows),
            ids=self._ids,
            seed=self._seed,
        )

    def _compare_encoded(self, candidate: Engine) -> None:
        """Compare what candidate and reference hold of each source."""
        if not any(self._encoded.values()):
            return
        meter = self._meters["encoder"] = DifferenceMeter(self._limits)
        for number, shown in encoded(candidate, self._rows):
            expected = self._encoded[number]
            for name, array in shown.items():
                own: FloatArray = expected[name][0].astype(np.float32)
                # Behind a row's own source lies padding.
                array = array[tuple(slice(size) for size in own.shape)]
                # Unlike logits these have any size (Whisper's keys reach far beyond 100), and rounding goes with it.
                scale = np.float32(max(1.0, float(np.abs(own).max())))
                there: FloatArray = (array / scale).astype(np.float32)
                meter.update(own / scale, there)
        self._encoded = {}

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, len(self._cases) + 1)


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

    def logits(ids: IntArray, source: AnyArray | None = None) -> FloatArray:
        state = begin(engine, [source], capacity=len(ids))
        result, _ = engine.forward(ids[None, :], np.array([len(ids)], dtype=np.int64), state)
        return np.asarray(result[0])

    return logits


def engine_rounding(engine: Engine) -> Rounding:
    """Make the rounding of an engine that is the reference: it reads a row at once and in pieces."""
    whole = engine_reference(engine)

    def rounding(ids: IntArray, source: AnyArray | None = None) -> FloatArray:
        state, parts = begin(engine, [source], capacity=len(ids)), []
        for start in range(0, len(ids), _PIECE):
            piece = ids[None, start : start + _PIECE]
            logits, state = engine.forward(piece, np.array([piece.shape[1]], dtype=np.int64), state)
            parts.append(logits[0])
        largest: FloatArray = np.abs(np.concatenate(parts) - whole(ids, source)).max(-1)
        return largest

    return rounding


def _uncertain(rounding: Rounding | None, ids: IntArray, row: Row) -> FloatArray | None:
    if rounding is None:
        return None
    return rounding(ids) if row.source is None else rounding(ids, row.source)


def _median(rounding: Rounding | None, row: Row) -> Callable[[], float]:
    """Make what gives the median of the rounding of a row, measured once, and only if it is asked for."""

    @cache
    def median() -> float:
        found = _uncertain(rounding, row.ids, row)
        return 0.0 if found is None else float(np.median(found))

    return median


_Slack: TypeAlias = Callable[[], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class _Oracle:
    """The reference together with its uncertainty."""

    reference: Reference
    rounding: Rounding | None
    usual: Callable[[], float]
    facts: ModelFacts
    limits: Tolerance

    def logits(self, ids: IntArray, row: Row) -> FloatArray:
        logits = self.reference(ids) if row.source is None else self.reference(ids, row.source)
        if logits.shape != (len(ids), self.facts.vocab_size):
            raise ShapeError(
                f"the reference gave logits of shape {logits.shape} for {len(ids)} tokens; "
                f"expected {(len(ids), self.facts.vocab_size)}: one row for each token, unpadded."
            )
        return logits

    def slack(self, ids: IntArray, row: Row) -> _Slack:
        """Make what gives `(tokens,)` slack of a row, measured once, and only if it is asked for."""

        @cache
        def slack() -> NDArray[np.float64]:
            uncertain = _uncertain(self.rounding, ids, row)
            if uncertain is None:
                return np.zeros(len(ids))
            most = _MOST_SLACK * (self.limits.atol or 0.0)
            shares: NDArray[np.float64] = _ROUNDING_SHARE * np.maximum(uncertain, self.usual())
            return np.minimum(shares, most)

        return slack


def _judge(meter: DifferenceMeter, expected: FloatArray, seen: Seen, slack: _Slack) -> None:
    place = slice(seen.start, seen.start + len(seen.logits))
    # The meter may keep what gives the slack: it must not hold on to the logits.
    meter.update(expected, seen.logits, lambda: slack()[place])
