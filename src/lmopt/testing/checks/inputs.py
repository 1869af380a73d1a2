"""Rules about requests that cannot be honoured: a typed error, never a wrong number."""

from functools import partial

import numpy as np

from lmopt.errors import DtypeError, LmoptError, ShapeError, TokenIdError, UnsupportedOptionError
from lmopt.testing.case import Case
from lmopt.testing.judge import feed, insist, insist_equal, make_rows, pack, refuses, truth
from lmopt.types import DTYPE_BYTES, AnyArray, IntArray


def check_unknown_option_is_refused(case: Case) -> None:
    """An option that the backend does not know raises `UnsupportedOptionError`."""
    error = refuses(
        lambda: case.open(options={**case.options, "no_such_option": 1}).close(),
        UnsupportedOptionError,
        when="the unknown option 'no_such_option'",
    )
    insist("no_such_option" in str(error), f"the message does not name the option: {error}")


def check_undeclared_device_and_dtype_are_refused(case: Case) -> None:
    """A device or compute type outside the declared ones raises a typed error; nothing is replaced."""
    for device in {"cuda", "abacus"} - set(case.spec.can.devices):
        refuses(partial(case.open, device=device), LmoptError, when=f"the device {device!r}")
    for dtype in {*DTYPE_BYTES, "float3"} - set(case.spec.can.dtypes):
        refuses(partial(case.open, dtype=dtype), LmoptError, when=f"the compute type {dtype!r}")


def check_ids_outside_the_vocabulary_are_refused(case: Case) -> None:
    """An id below 0 or beyond the vocabulary raises `TokenIdError`, in any row and at any step."""
    with case.engine() as engine:
        for bad in (-1, case.subject.facts.vocab_size, 2**40):
            ids, lengths = pack(make_rows(case, [4, 4], seed=70))
            ids[1, 2] = bad
            refuses(
                partial(engine.forward, ids, lengths, engine.begin(2)),
                TokenIdError,
                when=f"the token id {bad}",
            )
        _, state = feed(engine, make_rows(case, [3], seed=71))
        one = np.array([[case.subject.facts.vocab_size]], np.int64)
        refuses(
            lambda: engine.forward(one, np.ones(1, np.int64), state),
            TokenIdError,
            when="an id outside the vocabulary while decoding",
        )


def check_wrong_shapes_are_refused(case: Case) -> None:
    """Wrong rank, no token, lengths that do not fit, and another batch than the state's: `ShapeError`."""
    ids, lengths = pack(make_rows(case, [4, 4], seed=72))
    wrong: dict[str, tuple[IntArray, IntArray]] = {
        "ids of one axis": (ids[0], lengths),
        "ids of three axes": (ids[None], lengths),
        "ids without a column": (ids[:, :0], lengths),
        "lengths of two axes": (ids, lengths[None]),
        "one length too few": (ids, lengths[:1]),
        "a length of 0": (ids, np.array([4, 0])),
        "a negative length": (ids, np.array([4, -1])),
        "a length beyond the columns": (ids, np.array([4, 5])),
        "three rows for a state of two": (np.repeat(ids[:1], 3, axis=0), np.repeat(lengths[:1], 3)),
        "one row for a state of two": (ids[:1], lengths[:1]),
    }
    with case.engine() as engine:
        for what, (bad_ids, bad_lengths) in wrong.items():
            refuses(
                partial(engine.forward, bad_ids, bad_lengths, engine.begin(2)),
                ShapeError,
                when=what,
            )


def check_ids_must_be_integers(case: Case) -> None:
    """Ids or lengths that are not integers raise `DtypeError`; they are never rounded."""
    ids, lengths = pack(make_rows(case, [4], seed=73))
    with case.engine() as engine:
        wrong: tuple[tuple[str, AnyArray, AnyArray], ...] = (
            ("float ids", ids + 0.5, lengths),
            ("boolean ids", ids > 0, lengths),
            ("float lengths", ids, lengths.astype(np.float32)),
        )
        for what, bad_ids, bad_lengths in wrong:
            refuses(partial(engine.forward, bad_ids, bad_lengths, engine.begin(1)), DtypeError, when=what)


def check_a_refusal_leaves_the_engine_usable(case: Case) -> None:
    """After refused input the same engine still gives the right result."""
    rows = make_rows(case, [5, 5], seed=74)
    with case.engine() as engine:
        ids, lengths = pack(rows)
        ids[0, 0] = case.subject.facts.vocab_size
        refuses(lambda: engine.forward(ids, lengths, engine.begin(2)), TokenIdError, when="a wrong id")
        given, _ = feed(engine, rows)
        insist_equal(case, truth(case, rows), given, "the call after a refused one")


INPUT_CHECKS = (
    check_unknown_option_is_refused,
    check_undeclared_device_and_dtype_are_refused,
    check_ids_outside_the_vocabulary_are_refused,
    check_wrong_shapes_are_refused,
    check_ids_must_be_integers,
    check_a_refusal_leaves_the_engine_usable,
)
