"""Rows of unequal length on an engine that only takes equal ones.

Rows that have read equally much and read equally much next form a cohort with a state of its own. One
`forward` of the batch is one `forward` a cohort.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from lmopt.contracts import Engine, EngineReport, PaddingSide, State, SupportsEncoder, SupportsRewind
from lmopt.errors import UnsupportedError
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts

_POSITIONS: Final = 4096
"""Positions of sources, padding included, that are read in one call: enough to keep any CPU busy."""


@dataclass(frozen=True, slots=True)
class _Cohort:
    """Rows of equal length.

    Attributes:
        rows: `(n,)` int64, where the rows stand in the batch.
        state: The engine's state, `None` before anything is read.
        length: Tokens that each row has read.
        sources: What their encoder is going to read, as `encode` takes it, and its lengths; `None` afterwards.
        positions: Length of their sources, where rows with others cannot join them; else 0.
    """

    rows: IntArray
    state: State | None = None
    length: int = 0
    sources: tuple[AnyArray, IntArray] | None = None
    positions: int = 0

    def at(self, rows: IntArray, inside: IntArray) -> "_Cohort":
        """Give the cohort of some of these rows before anything is read: they stand at `rows` then."""
        sources = None if self.sources is None else (self.sources[0][inside], self.sources[1][inside])
        return replace(self, rows=rows, sources=sources)


@dataclass(frozen=True, slots=True)
class CohortState:
    """State of a batch whose rows may differ in length.

    Attributes:
        cohorts: Its groups; together they hold each row once.
        batch: Number of rows.
        capacity: As given to `begin`.
        padding_side: As given to `begin`.
    """

    cohorts: tuple[_Cohort, ...]
    batch: int
    capacity: int | None
    padding_side: PaddingSide

    @property
    def lengths(self) -> IntArray:
        """`(batch,)` int64, tokens that each row has read so far."""
        lengths = np.zeros(self.batch, np.int64)
        for cohort in self.cohorts:
            lengths[cohort.rows] = cohort.length
        return lengths


class CohortEngine:
    """An engine for unequal rows, made of one that is not.

    Args:
        engine: Engine whose `ragged` is `False`; stays the caller's to close.
    """

    ragged = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def rewinds(self) -> bool:
        """Whether the inner engine's rows can be copied and rewound."""
        return isinstance(self._engine, SupportsRewind) and self._engine.rewinds

    @property
    def facts(self) -> ModelFacts:
        """Facts of the inner engine's model."""
        return self._engine.facts

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> CohortState:
        """Make the empty state of `batch` rows; the inner states come with the first tokens."""
        return CohortState((_Cohort(np.arange(batch)),), batch, capacity, padding_side)

    @property
    def ragged_sources(self) -> bool:
        """Whether rows may have sources of unequal length: always, here."""
        return True

    def encode(
        self,
        inputs: AnyArray,
        lengths: IntArray,
        *,
        capacity: int | None = None,
        padding_side: PaddingSide = "right",
    ) -> CohortState:
        """Take the sources of some rows; they are read when it is known which rows go together."""
        apart = not self._encoder().ragged_sources
        cohorts = []
        for positions in np.unique(lengths) if apart else (0,):
            rows = np.flatnonzero(lengths == positions) if apart else np.arange(len(lengths))
            given = np.ascontiguousarray(inputs[rows][..., : lengths[rows].max()]), lengths[rows]
            cohorts.append(_Cohort(rows, sources=given, positions=int(positions)))
        return CohortState(tuple(cohorts), len(lengths), capacity, padding_side)

    def encoded(self, state: State) -> Mapping[str, AnyArray]:
        """Show what rows hold of their sources, which must be together in one cohort.

        Raises:
            UnsupportedError: They are not.
        """
        cohorts = _own(state).cohorts
        if len(cohorts) != 1:
            raise UnsupportedError(
                "rows whose sources are kept apart cannot be shown together. Show one at a time."
            )
        (cohort,) = cohorts
        if cohort.state is not None:
            return self._encoder().encoded(cohort.state)
        assert cohort.sources is not None
        return self._encoder().encoded(self._encoder().encode(*cohort.sources))

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: State, *, last_only: bool = False
    ) -> tuple[FloatArray, CohortState]:
        """Read new tokens, cohort by cohort; see `lmopt.contracts.Engine.forward`.

        Raises:
            UnsupportedError: Rows that share a state are given unequal numbers of tokens, and the
                engine cannot copy it: there is no way to take it apart.
        """
        state = _own(state)
        cohorts: list[_Cohort] = []
        results: list[FloatArray] = []
        for cohort in (part for whole in state.cohorts for part in self._split(whole, lengths)):
            width = int(lengths[cohort.rows[0]])
            inner = cohort.state
            if cohort.sources is not None:
                inner = encode_in_parts(
                    self._engine, *cohort.sources, capacity=state.capacity, padding_side=state.padding_side
                )
            elif inner is None:
                inner = self._engine.begin(
                    cohort.rows.size, capacity=state.capacity, padding_side=state.padding_side
                )
            logits, inner = self._engine.forward(
                np.ascontiguousarray(input_ids[cohort.rows, :width]),
                lengths[cohort.rows],
                inner,
                last_only=last_only,
            )
            results.append(logits)
            cohorts.append(_Cohort(cohort.rows, inner, cohort.length + width, positions=cohort.positions))
        after = replace(state, cohorts=tuple(cohorts))
        if len(cohorts) == 1 and (last_only or results[0].shape[1] == input_ids.shape[1]):
            order = cohorts[0].rows
            return (results[0] if (order[:-1] < order[1:]).all() else _placed(results, after, 1)), after
        return _placed(results, after, 1 if last_only else input_ids.shape[1]), after

    def select(self, state: State, rows: IntArray) -> CohortState:
        """Keep, drop, reorder or repeat rows."""
        state = _own(state)
        cohorts = []
        for cohort in state.cohorts:
            place = np.full(state.batch, -1)
            place[cohort.rows] = np.arange(cohort.rows.size)
            inside = place[rows]
            wanted = np.flatnonzero(inside >= 0)
            if wanted.size == 0:
                continue
            inner = cohort.state
            if cohort.sources is not None:
                cohorts.append(cohort.at(wanted, inside[wanted]))
                continue
            if inner is not None and not np.array_equal(inside[wanted], np.arange(cohort.rows.size)):
                inner = self._engine.select(inner, inside[wanted])
            cohorts.append(_Cohort(wanted, inner, cohort.length, positions=cohort.positions))
        return replace(state, cohorts=tuple(cohorts), batch=rows.size)

    def join(self, states: Sequence[State]) -> CohortState:
        """Put the rows of several states into one batch; cohorts of equal length become one."""
        owned = [_own(state) for state in states]
        by_length: dict[tuple[int, ...], list[_Cohort]] = {}
        offset = 0
        for state in owned:
            for cohort in state.cohorts:
                moved = replace(cohort, rows=cohort.rows + offset)
                kind: tuple[int, ...] = (cohort.state is None, cohort.length, cohort.positions)
                if cohort.sources is not None:
                    # Not read yet: nothing to put together.
                    kind = (*kind, len(by_length))
                by_length.setdefault(kind, []).append(moved)
            offset += state.batch
        cohorts = []
        for group in by_length.values():
            if len(group) == 1:
                cohorts += group
                continue
            rows = np.concatenate([cohort.rows for cohort in group])
            inner = [cohort.state for cohort in group if cohort.state is not None]
            joined = self._engine.join(inner) if len(inner) > 1 else (inner[0] if inner else None)
            cohorts.append(_Cohort(rows, joined, group[0].length, positions=group[0].positions))
        return replace(owned[0], cohorts=tuple(cohorts), batch=offset)

    def rewind(self, state: State, lengths: IntArray) -> CohortState:
        """Let each row forget all but its first tokens; see `lmopt.contracts.SupportsRewind`."""
        state = _own(state)
        cohorts = []
        for part in (part for whole in state.cohorts for part in self._split(whole, lengths)):
            length = int(lengths[part.rows[0]])
            inner = part.state
            if inner is not None and length < part.length:
                inner = self._engine.rewind(inner, lengths[part.rows])  # type: ignore[attr-defined]
            cohorts.append(replace(part, state=inner, length=length))
        return replace(state, cohorts=tuple(cohorts))

    def copy(self, state: State, *, capacity: int | None = None) -> CohortState:
        """Make an independent copy; see `lmopt.contracts.SupportsRewind`."""
        state = _own(state)
        cohorts = tuple(
            one if one.state is None else replace(one, state=self._copy(one.state, capacity))
            for one in state.cohorts
        )
        return replace(state, cohorts=cohorts, capacity=state.capacity if capacity is None else capacity)

    def report(self) -> EngineReport:
        """Report of the inner engine."""
        return self._engine.report()

    def close(self) -> None:
        """Close the inner engine."""
        self._engine.close()

    def _encoder(self) -> SupportsEncoder:
        return _with_encoder(self._engine)

    def _copy(self, state: State, capacity: int | None = None) -> State:
        copied: State = self._engine.copy(state, capacity=capacity)  # type: ignore[attr-defined]
        return copied

    def _split(self, cohort: _Cohort, numbers: IntArray) -> list[_Cohort]:
        """Take a cohort apart into rows that have the same number in `numbers`, which is `(batch,)`."""
        own = numbers[cohort.rows]
        kinds = np.unique(own)
        if kinds.size == 1:
            return [cohort]
        if cohort.state is None:
            return [cohort.at(cohort.rows[own == kind], np.flatnonzero(own == kind)) for kind in kinds]
        if not self.rewinds:
            raise UnsupportedError(
                "rows that have read equally much are given unequal numbers of new tokens, and this engine's "
                "state cannot be taken apart. Feed them one token at a time, or begin a state for each row."
            )
        parts = []
        for kind in kinds:
            inside = np.flatnonzero(own == kind)
            whole = cohort.state if kind == kinds[-1] else self._copy(cohort.state)
            parts.append(replace(cohort, rows=cohort.rows[inside], state=self._engine.select(whole, inside)))
        return parts


def for_unequal_rows(engine: Engine) -> Engine:
    """Give an engine that takes rows of unequal length: this one, or a `CohortEngine` around it."""
    return engine if engine.ragged else CohortEngine(engine)


def encode_in_parts(
    engine: Engine,
    inputs: AnyArray,
    lengths: IntArray,
    *,
    capacity: int | None = None,
    padding_side: PaddingSide = "right",
) -> State:
    """Read sources, some rows at a time where they are long: attention within a source grows with its square.

    Args:
        engine: The engine; see `lmopt.contracts.SupportsEncoder.encode` for the others.
        inputs: Sources, side by side.
        lengths: Their lengths.
        capacity: As for `encode`.
        padding_side: As for `encode`.
    """
    encoder = _with_encoder(engine)
    size = max(1, _POSITIONS // int(lengths.max()))
    states = []
    for start in range(0, len(lengths), size):
        part, own = inputs[start : start + size], lengths[start : start + size]
        part = np.ascontiguousarray(part[..., : own.max()])
        states.append(encoder.encode(part, own, capacity=capacity, padding_side=padding_side))
    return states[0] if len(states) == 1 else engine.join(states)


def _with_encoder(engine: Engine) -> SupportsEncoder:
    if not isinstance(engine, SupportsEncoder):
        raise UnsupportedError(
            f"{engine.report().backend!r} runs no encoder-decoder models: it has no encode"
        )
    return engine


def _own(state: State) -> CohortState:
    if not isinstance(state, CohortState):
        raise UnsupportedError(f"expected a state of this CohortEngine, was given a {type(state).__name__}.")
    return state


def _placed(results: list[FloatArray], state: CohortState, width: int) -> FloatArray:
    """Put the logits of the cohorts where their rows stand."""
    logits = np.zeros((state.batch, width, results[0].shape[-1]), np.float32)
    for cohort, result in zip(state.cohorts, results, strict=True):
        logits[cohort.rows, : result.shape[1]] = result
    return logits
