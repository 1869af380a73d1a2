"""Find where inside a model two engines part: the first block, then the first operator in it.

Both engines run the same ids from an empty state and show values under module names, such as
`model.layers.3` and `model.layers.3.mlp.up_proj`. The values of all blocks come from one run a side;
only the block that is to blame is run again, for its inside.

Rounding errors grow slowly through a model, while a defect makes them jump. A value is therefore held
to be wrong not where its error is large, but where it is far larger than that of everything computed
before it.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from lmopt.contracts import Engine, SupportsTaps
from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.types import AnyArray, IntArray

# Relative error of a single value that the type's own rounding explains: a sum over some thousand
# products ends within 16 units in the last place of a float32, 4 of a half type.
ROUNDING: Final[Mapping[str, float]] = {"float32": 2e-6, "float16": 2.0**-8, "bfloat16": 2.0**-5}
_GROWTH: Final = 8.0


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two engines part.

    Attributes:
        block: Outermost value that is wrong while all before it are right, such as
            `model.layers.3`; `None` where nothing jumps.
        operator: First wrong value inside the block; the block itself where its parts are right, so
            that what joins them (a residual sum, say) must be wrong.
        last_agreeing: Last right value before the operator; `None` where the first one is wrong.
        error: Largest relative error of the operator's value.
        error_before: Largest relative error of everything computed before it.
        suspects: Operators that lie between `last_agreeing` and `operator`, that one first. A module
            whose own code runs there, such as `model.layers.3.self_attn` between its projections, is
            among them.
        errors: Every measured relative error by name, in order of computation.
        missing: Names that only one of the engines shows.
    """

    block: str | None
    operator: str | None
    last_agreeing: str | None
    error: float
    error_before: float
    suspects: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say in a sentence where to look."""
        if self.operator is None:
            return (
                f"no value jumps: {len(self.errors)} values agree, largest relative error {self.error:.1e}. "
                "In a single pass from an empty state the engines agree; if they differ in use, look at the "
                "cache, the padding or the batching."
            )
        return (
            f"first difference in {self.block}, operator {self.operator}: relative error {self.error:.1e} "
            f"after {self.error_before:.1e}; last value that agrees: {self.last_agreeing or 'none'}. "
            f"Suspects: {', '.join(self.suspects)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the finding as plain values."""
        return {
            "block": self.block,
            "operator": self.operator,
            "last_agreeing": self.last_agreeing,
            "error": self.error,
            "error_before": self.error_before,
            "suspects": list(self.suspects),
            "errors": dict(self.errors),
            "missing": list(self.missing),
        }


def locate(
    reference: Engine | SupportsTaps,
    candidate: Engine | SupportsTaps,
    input_ids: IntArray,
    *,
    source: AnyArray | None = None,
    dtype: str = "float32",
    tolerance: float | None = None,
) -> Divergence:
    """Find the first block, and in it the first operator, whose value is wrong.

    Args:
        reference: Engine that is right.
        candidate: Engine under suspicion.
        input_ids: `(sequence,)` or `(1, sequence)` int64 ids; a few dozen tokens are enough.
        source: What the encoders of two encoder-decoders read before, ids or features of one row.
        dtype: Coarser of the two engines' types, for the rounding to expect.
        tolerance: Relative error that rounding explains, in place of the one for `dtype`. A value
            is wrong where its error exceeds eight times both this and all errors before it.

    Returns:
        The finding; `block` is `None` where nothing jumps.

    Raises:
        UnsupportedError: An engine cannot show values, or the two share no name.
        UnsupportedOptionError: `dtype` is unknown.
    """
    after = source is not None
    ours, theirs = (
        _with_taps(side, engine, after=after)
        for side, engine in (("reference", reference), ("candidate", candidate))
    )
    if tolerance is None:
        if dtype not in ROUNDING:
            raise UnsupportedOptionError(
                f"no rounding error is known for dtype {dtype!r}; pass tolerance=, or one of "
                f"{', '.join(ROUNDING)}."
            )
        tolerance = ROUNDING[dtype]
    given = {} if source is None else {"source": source[None]}
    return _Search(ours, theirs, np.atleast_2d(input_ids), given, tolerance).run()


def _with_taps(side: str, engine: Engine | SupportsTaps, *, after: bool) -> SupportsTaps:
    if isinstance(engine, SupportsTaps):
        if after and "source" not in inspect.signature(engine.taps).parameters:
            raise UnsupportedError(
                f"the {side} engine ({type(engine).__name__}) shows values of models without an encoder only, so a "
                "difference cannot be located. Give its method taps the parameter source, as "
                "lmopt.contracts.SupportsTaps says"
            )
        return engine
    raise UnsupportedError(
        f"the {side} engine ({type(engine).__name__}) cannot show values inside the model, so a "
        "difference cannot be located. Compare engines whose backend declares the feature 'taps': "
        "`lmopt backends` lists them."
    )


class _Search:
    """One search: the two engines, and the errors measured so far."""

    def __init__(
        self,
        reference: SupportsTaps,
        candidate: SupportsTaps,
        ids: IntArray,
        before: Mapping[str, AnyArray],
        tolerance: float,
    ) -> None:
        self.reference = reference
        self.candidate = candidate
        self.ids = ids
        self.before = before
        self.tolerance = tolerance
        ours, theirs = list(reference.tap_names()), list(candidate.tap_names())
        self.names = [name for name in ours if name in set(theirs)]
        self.missing = tuple(sorted(set(ours) ^ set(theirs)))
        self.errors: dict[str, float] = {}
        if not self.names:
            raise UnsupportedError(
                f"the engines show no value under a common name: {ours[:3]} ... against {theirs[:3]} ..."
            )

    def run(self) -> Divergence:
        level = _outermost(self.names)
        before: list[str] = []  # names whose values agree, in order
        path: list[str] = []  # wrong values, each inside the one before
        floor = 0.0
        while level:
            good, found = self.first_jump(level, floor)
            floor = max([floor, *(self.errors[name] for name in good)])
            before += good
            if found is None:
                break
            path.append(found)
            inside = [name for name in self.names if name.startswith(found + ".")]
            level = _outermost(inside)
        ordered = {name: self.errors[name] for name in self.names if name in self.errors}
        if not path:
            return Divergence(None, None, None, max(ordered.values()), 0.0, (), ordered, self.missing)
        wrong, block = path[-1], _block(path)
        last = max(before, key=self.names.index, default=None)
        return Divergence(
            block=block,
            operator=wrong,
            last_agreeing=last,
            error=self.errors[wrong],
            error_before=floor,
            suspects=self.suspects(block, wrong, last),
            errors=ordered,
            missing=self.missing,
        )

    def first_jump(self, level: Sequence[str], floor: float) -> tuple[list[str], str | None]:
        """Measure the values of a level; give those before the first wrong one, and that one."""
        ours = self.reference.taps(self.ids, level, **self.before)
        theirs = self.candidate.taps(self.ids, level, **self.before)
        self.errors.update({name: relative_error(ours[name], theirs[name]) for name in level})
        good: list[str] = []
        for name in level:
            error = self.errors[name]
            if error > _GROWTH * max(self.tolerance, floor):
                return good, name
            floor = max(floor, error)
            good.append(name)
        return good, None

    def suspects(self, block: str, wrong: str, last: str | None) -> tuple[str, ...]:
        """What runs between the last right value and the first wrong one."""
        start = self.names.index(last) + 1 if last is not None else 0
        between = self.names[start : self.names.index(wrong)]
        # A module's own code runs between its parts.
        owner = wrong.rpartition(".")[0] if wrong != block else ""
        return tuple(dict.fromkeys(filter(None, [wrong, *between, owner])))


def _block(path: Sequence[str]) -> str:
    """The block among nested names: the outermost numbered one, such as `model.layers.3`."""
    numbered = (name for name in path if name.rpartition(".")[2].isdigit())
    return next(numbered, path[-1])


def relative_error(reference: AnyArray, candidate: AnyArray) -> float:
    """Largest `|a - b| / (|a| + rms of a's vector)` over all values.

    The size of the vector in the denominator keeps values near zero from counting as wrong, and the
    value's own size keeps the few huge channels of a trained model from drowning the others.

    Args:
        reference: `(..., width)` values.
        candidate: As many values, in the same order; their shape may differ by axes of size 1.

    Returns:
        The error; infinity where the sizes differ or only one side is NaN.
    """
    a, b = np.asarray(reference, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if a.size != b.size:
        return float("inf")
    if not a.size:
        return 0.0
    b = b.reshape(a.shape)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    size = np.abs(a) + np.sqrt((a * a).mean(axis=-1, keepdims=True) if a.ndim else a * a)
    return float(np.divide(np.abs(a - b), size, out=np.where(a == b, 0.0, np.inf), where=size > 0).max())


def _outermost(names: Sequence[str]) -> list[str]:
    """Names that lie inside no other of the names; a lone one that holds all others is opened."""
    known = set(names)

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in known for end in range(1, len(parts)))

    outer = [name for name in names if not inside(name)]
    if len(outer) == 1 and len(names) > 1:
        return _outermost([name for name in names if name != outer[0]]) + outer
    return outer
