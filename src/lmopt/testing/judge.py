"""Small words that the checks are written in: make rows, run them, compare them, insist."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from lmopt.contracts import Engine, State
from lmopt.errors import ConformanceError, LmoptError
from lmopt.evaluation.divergence import DifferenceMeter
from lmopt.evaluation.tolerances import tolerance_for
from lmopt.testing.case import Case
from lmopt.types import FloatArray, IntArray

PADDING_ID = -100
"""What the kit fills padding with: outside every vocabulary, so that reading it shows."""


def insist(condition: bool, message: str) -> None:
    """Raise `ConformanceError` with `message` unless `condition` holds."""
    if not condition:
        raise ConformanceError(message)


def refuses(action: Callable[[], object], *errors: type[LmoptError], when: str) -> LmoptError:
    """Insist that `action` raises one of `errors`; give the error."""
    wanted = " or ".join(error.__name__ for error in errors)
    try:
        action()
    except errors as error:
        return error
    except Exception as error:
        raise ConformanceError(
            f"{when} must raise lmopt.errors.{wanted}; it raised {type(error).__name__}: {error}"
        ) from error
    raise ConformanceError(f"{when} must raise lmopt.errors.{wanted}; it was accepted")


def make_rows(case: Case, lengths: Sequence[int], *, seed: int = 0) -> list[IntArray]:
    """Draw one row of random ids a length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, case.subject.facts.vocab_size, length) for length in lengths]


def pack(rows: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """Lay rows into `(batch, sequence)` ids, right-padded, and their `(batch,)` lengths."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.full((len(rows), int(lengths.max())), PADDING_ID, np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids, lengths


def feed(
    engine: Engine, rows: Sequence[IntArray], state: State | None = None
) -> tuple[list[FloatArray], State]:
    """Let an engine read rows; give the logits of each, without padding, and the next state."""
    ids, lengths = pack(rows)
    logits, state = engine.forward(ids, lengths, engine.begin(len(rows)) if state is None else state)
    insist_logits(logits, (*ids.shape, engine.facts.vocab_size))
    return [logits[index, : len(row)] for index, row in enumerate(rows)], state


def insist_logits(logits: object, shape: tuple[int, ...]) -> None:
    """Insist on a float32 NumPy array of this shape."""
    insist(isinstance(logits, np.ndarray), f"logits are a {type(logits).__name__}, not a NumPy array")
    assert isinstance(logits, np.ndarray)
    insist(logits.dtype == np.float32, f"logits are {logits.dtype}; the contract says float32")
    insist(logits.shape == shape, f"logits have shape {logits.shape}; expected {shape}")


def insist_lengths(state: State, expected: Sequence[int], when: str) -> None:
    """Insist that a state counts the tokens that its rows have read."""
    given = np.asarray(state.lengths)
    insist(
        given.dtype == np.int64 and given.tolist() == list(expected),
        f"state.lengths {when} is {given.tolist()} ({given.dtype}); expected {list(expected)} (int64)",
    )


def truth(case: Case, rows: Sequence[IntArray]) -> list[FloatArray]:
    """Run the reference over each row by itself."""
    return [case.subject.reference(row) for row in rows]


def insist_equal(case: Case, expected: Sequence[FloatArray], given: Sequence[FloatArray], what: str) -> None:
    """Insist that logits agree within the tolerance of the case's compute type.

    Args:
        case: Names the compute type.
        expected: `(positions, vocab)` reference logits, one array a row.
        given: What the engine gave for the same rows.
        what: Words for the message.
    """
    limits = tolerance_for(case.dtype)
    meter = DifferenceMeter(limits)
    worst, worst_row = -1.0, 0
    for row, (reference, candidate) in enumerate(zip(expected, given, strict=True)):
        meter.update(reference, candidate)
        error = float(np.nan_to_num(np.abs(reference - candidate), nan=np.inf).max())
        worst, worst_row = max((worst, worst_row), (error, row), key=lambda pair: pair[0])
    found = meter.result()
    # A share of few positions is coarse: one miss may be within it.
    misses_allowed = math.ceil((1 - limits.top1) * found.positions)
    excess = []
    if found.nonfinite:
        excess.append(f"{found.nonfinite} positions with NaN or infinity")
    if found.max_ratio > 1:
        excess.append(f"max |difference| {found.max_abs:.3g} is {found.max_ratio:.3g} x the limit")
    if found.kl_mean > limits.kl_mean:
        excess.append(f"mean KL {found.kl_mean:.3g} > {limits.kl_mean:g}")
    if found.top1_misses > misses_allowed:
        excess.append(f"{found.top1_misses} of {found.positions} most likely tokens differ")
    insist(not excess, f"{what}: row {worst_row} differs most from the reference ({'; '.join(excess)})")
