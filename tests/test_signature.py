"""The bookkeeping of masks, positions, padding and rows, on a toy graph whose truth is exact.

The toy's logits depend on nothing but a row's own tokens and their positions, in whole numbers, so
that any layout, any split over calls and any padding must give the very same numbers.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmopt.checking import check_step
from lmopt.errors import CorruptArtifactError, ShapeError, TokenIdError, UnsupportedError
from lmopt.signature import ArrayState, Signature, present_name, together
from lmopt.types import BATCH, PAST, SEQUENCE, TOTAL, AnyArray, FloatArray, IntArray, TensorSpec

VOCAB = 13
MODULUS = 8191

CACHED = Signature.from_graph(
    (
        TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
        TensorSpec("attention_mask", "int64", (BATCH, TOTAL)),
        TensorSpec("position_ids", "int64", (BATCH, SEQUENCE)),
        TensorSpec("past_key_values.0.key", "int64", (BATCH, 1, PAST, 2)),
    ),
    (
        TensorSpec("logits", "float32", (BATCH, SEQUENCE, VOCAB)),
        TensorSpec("present.0.key", "int64", (BATCH, 1, TOTAL, 2)),
    ),
)
RECURRENT = Signature.from_graph(
    (
        TensorSpec("input_ids", "int64", (BATCH, SEQUENCE)),
        TensorSpec("past_state.0", "int64", (2, BATCH)),
    ),
    (
        TensorSpec("logits", "float32", (BATCH, SEQUENCE, VOCAB)),
        TensorSpec("present_state.0", "int64", (2, BATCH)),
    ),
)


def spread(number: AnyArray) -> FloatArray:
    """Turn `(...)` numbers into `(..., VOCAB)` logits that tell them apart."""
    return ((number[..., None] * (np.arange(VOCAB) + 1)) % MODULUS).astype(np.float32)


def truth(row: IntArray) -> FloatArray:
    """Logits of the cached toy after each token of one row, straight from the definition."""
    terms = (row + 1) * (np.arange(len(row)) + 1) ** 2
    return spread(np.cumsum(terms))


def run_cached(
    feeds: dict[str, AnyArray], tensors: dict[str, AnyArray]
) -> tuple[FloatArray, dict[str, AnyArray]]:
    """The cached toy as a graph: it keeps `(token, position)` of every slot and sums the valid ones."""
    ids, mask, positions = feeds["input_ids"], feeds["attention_mask"], feeds["position_ids"]
    new = np.stack([ids, positions], axis=-1)[:, None]
    cache = np.concatenate([tensors["past_key_values.0.key"], new], axis=2)
    terms = (cache[:, 0, :, 0] + 1) * (cache[:, 0, :, 1] + 1) ** 2 * mask
    sums = np.cumsum(terms, axis=1)[:, -ids.shape[1] :]
    return spread(sums), {"past_key_values.0.key": cache}


def run_recurrent(
    feeds: dict[str, AnyArray], tensors: dict[str, AnyArray]
) -> tuple[FloatArray, dict[str, AnyArray]]:
    """A toy with a state of fixed size, its batch axis last."""
    first, second = tensors["past_state.0"]
    logits = []
    for column in feeds["input_ids"].T:
        first, second = (3 * first + column + 1) % MODULUS, (second + first) % MODULUS
        logits.append(spread(first + second))
    return np.stack(logits, axis=1), {"past_state.0": np.stack([first, second])}


def pack(rows: Sequence[IntArray], filler: int = -7) -> tuple[IntArray, IntArray]:
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), filler)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return ids, lengths


def read(
    state: ArrayState, rows: Sequence[IntArray], *, last_only: bool = False
) -> tuple[list[FloatArray], ArrayState]:
    """Run one call as an engine does and give the logits of each row."""
    ids, lengths = pack(rows)
    step = CACHED.step(ids, lengths, state)
    logits, tensors = run_cached(dict(step.feeds), state.tensors)
    aligned = step.align(logits, last_only=last_only)
    after = ArrayState(tensors, step.mask, step.lengths, step.padding_side)
    return [one if last_only else one[: len(row)] for one, row in zip(aligned, rows, strict=True)], after


def tokens(least: int = 1, most: int = 9) -> st.SearchStrategy[IntArray]:
    ids = st.lists(st.integers(0, VOCAB - 1), min_size=least, max_size=most)
    return ids.map(lambda values: np.array(values, np.int64))


batches = st.lists(tokens(), min_size=1, max_size=4)
sides = st.sampled_from(["left", "right"])


@st.composite
def split_batches(draw: st.DrawFn) -> list[list[IntArray]]:
    """Calls, each with one part (at least a token) of every row."""
    rows = draw(st.integers(1, 4))
    calls = draw(st.integers(1, 4))
    return [[draw(tokens(1, 5)) for _ in range(rows)] for _ in range(calls)]


@given(split_batches(), sides)
@settings(max_examples=150, deadline=None)
def test_any_split_and_padding_gives_the_truth(calls: list[list[IntArray]], side: str) -> None:
    state = CACHED.begin(len(calls[0]), side)
    so_far = [np.zeros(0, np.int64) for _ in calls[0]]
    for rows in calls:
        given_logits, state = read(state, rows)
        so_far = [np.concatenate(pair) for pair in zip(so_far, rows, strict=True)]
        for whole, part, logits in zip(so_far, rows, given_logits, strict=True):
            assert np.array_equal(logits, truth(whole)[-len(part) :])
        assert state.lengths.tolist() == [len(row) for row in so_far]
        assert (state.mask.sum(axis=1) == state.lengths).all()


@given(split_batches(), sides)
@settings(max_examples=60, deadline=None)
def test_last_only_is_each_rows_own_last(calls: list[list[IntArray]], side: str) -> None:
    state = CACHED.begin(len(calls[0]), side)
    so_far = [np.zeros(0, np.int64) for _ in calls[0]]
    for rows in calls:
        logits, state = read(state, rows, last_only=True)
        so_far = [np.concatenate(pair) for pair in zip(so_far, rows, strict=True)]
        for whole, last in zip(so_far, logits, strict=True):
            assert np.array_equal(last, truth(whole)[-1:])


@given(batches, sides, st.data())
@settings(max_examples=80, deadline=None)
def test_selected_rows_keep_their_own_past(rows: list[IntArray], side: str, data: st.DataObject) -> None:
    _, state = read(CACHED.begin(len(rows), side), rows)
    for _ in range(2):
        picked = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
        state = CACHED.select(state, np.array(picked))
        rows = [rows[index] for index in picked]
        more = [data.draw(tokens(1, 3)) for _ in rows]
        given_logits, state = read(state, more)
        rows = [np.concatenate(pair) for pair in zip(rows, more, strict=True)]
        for whole, part, logits in zip(rows, more, given_logits, strict=True):
            assert np.array_equal(logits, truth(whole)[-len(part) :])


@given(st.lists(batches, min_size=1, max_size=3), sides, st.data())
@settings(max_examples=80, deadline=None)
def test_joined_rows_keep_their_own_past(
    groups: list[list[IntArray]], side: str, data: st.DataObject
) -> None:
    states = [read(CACHED.begin(len(group), side), group)[1] for group in groups]
    state = CACHED.join(states)
    rows = [row for group in groups for row in group]
    assert state.lengths.tolist() == [len(row) for row in rows]
    for _ in range(2):
        more = [data.draw(tokens(1, 3)) for _ in rows]
        given_logits, state = read(state, more)
        rows = [np.concatenate(pair) for pair in zip(rows, more, strict=True)]
        for whole, part, logits in zip(rows, more, given_logits, strict=True):
            assert np.array_equal(logits, truth(whole)[-len(part) :])


@given(batches, sides, st.data())
@settings(max_examples=80, deadline=None)
def test_rows_that_forgot_read_on_as_if_they_had_never_known(
    rows: list[IntArray], side: str, data: st.DataObject
) -> None:
    _, state = read(CACHED.begin(len(rows), side), rows)
    for _ in range(2):
        keep = np.array([data.draw(st.integers(0, len(row))) for row in rows])
        state = CACHED.rewind(state, keep)
        assert state.lengths.tolist() == keep.tolist() == state.mask.sum(axis=1).tolist()
        slots = state.mask.shape[1]
        assert slots == 0 or state.mask[:, -1].any()
        assert state.tensors["past_key_values.0.key"].shape == (len(rows), 1, slots, 2)
        rows = [row[:length] for row, length in zip(rows, keep, strict=True)]
        more = [data.draw(tokens(1, 3)) for _ in rows]
        given_logits, state = read(state, more)
        rows = [np.concatenate(pair) for pair in zip(rows, more, strict=True)]
        for whole, part, logits in zip(rows, more, given_logits, strict=True):
            assert np.array_equal(logits, truth(whole)[-len(part) :])


@pytest.mark.parametrize("keep", [[3, 3], [-1, 2], [2]])
def test_more_than_was_read_cannot_be_kept(keep: list[int]) -> None:
    _, state = read(CACHED.begin(2), [np.arange(2), np.arange(3)])
    with pytest.raises(ShapeError, match="have read"):
        CACHED.forget(state, np.array(keep))


def test_a_state_without_memory_of_its_past_does_not_forget() -> None:
    assert CACHED.rewinds
    assert not RECURRENT.rewinds
    with pytest.raises(UnsupportedError, match="no cache"):
        RECURRENT.forget(RECURRENT.begin(1), np.array([0]))


@given(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=50, deadline=None)
def test_a_recurrent_state_is_carried_selected_and_joined(
    batch: int, widths: list[int], data: st.DataObject
) -> None:
    ids = data.draw(st.lists(tokens(sum(widths), sum(widths)), min_size=batch, max_size=batch))
    whole = np.stack(ids)
    zero = RECURRENT.begin(batch)
    expected, _ = run_recurrent({"input_ids": whole}, zero.tensors)
    state, start, pieces = zero, 0, []
    for width in widths:
        part = whole[:, start : start + width]
        step = RECURRENT.step(part, np.full(batch, width), state)
        assert set(step.feeds) == {"input_ids"}
        logits, tensors = run_recurrent(dict(step.feeds), state.tensors)
        pieces.append(step.align(logits, last_only=False))
        state = ArrayState(tensors, step.mask, step.lengths, step.padding_side)
        start += width
    assert np.array_equal(np.concatenate(pieces, axis=1), expected)
    order = np.arange(batch)[::-1]
    both = RECURRENT.join([RECURRENT.select(state, order), RECURRENT.select(state, order)])
    assert np.array_equal(both.tensors["past_state.0"], np.tile(state.tensors["past_state.0"][:, order], 2))


@given(batches, sides)
@settings(max_examples=40, deadline=None)
def test_ids_fed_to_the_graph_are_always_in_the_vocabulary(rows: list[IntArray], side: str) -> None:
    for filler in (-100, VOCAB, 2**40):
        ids, lengths = pack(rows, filler)
        fed = CACHED.step(ids, lengths, CACHED.begin(len(rows), side)).feeds
        assert fed["input_ids"].min() >= 0
        assert fed["input_ids"].max() < VOCAB
        assert fed["position_ids"].min() >= 0
        assert (fed["position_ids"].max(axis=1) == lengths - 1).all()


def test_a_step_changes_neither_the_state_nor_the_callers_arrays() -> None:
    rows = [np.array([1, 2, 3]), np.array([4])]
    _, state = read(CACHED.begin(2, "left"), rows)
    before = (state.mask.copy(), state.lengths.copy(), state.tensors["past_key_values.0.key"].copy())
    ids, lengths = pack(rows)
    ids_before = ids.copy()
    CACHED.step(ids, lengths, state)
    assert np.array_equal(ids, ids_before)
    assert np.array_equal(state.mask, before[0])
    assert np.array_equal(state.lengths, before[1])
    assert np.array_equal(state.tensors["past_key_values.0.key"], before[2])


def test_empty_state_has_the_declared_shape_and_type() -> None:
    state = CACHED.begin(3)
    assert state.tensors["past_key_values.0.key"].shape == (3, 1, 0, 2)
    assert state.tensors["past_key_values.0.key"].dtype == np.int64
    assert RECURRENT.begin(3).tensors["past_state.0"].shape == (2, 3)
    assert state.lengths.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("ids", "new", "read_before"),
    [
        (np.zeros(3, int), np.ones(1, int), np.zeros(1, int)),
        (np.zeros((1, 2, 3), int), np.ones(1, int), np.zeros(1, int)),
        (np.zeros((1, 0), int), np.ones(1, int), np.zeros(1, int)),
        (np.zeros((2, 3), int), np.ones(1, int), np.zeros(2, int)),
        (np.zeros((2, 3), int), np.ones((2, 1), int), np.zeros(2, int)),
        (np.zeros((2, 3), int), np.ones(2, int), np.zeros(3, int)),
        (np.zeros((2, 3), int), np.array([0, 1]), np.zeros(2, int)),
        (np.zeros((2, 3), int), np.array([1, 4]), np.zeros(2, int)),
        (np.zeros((2, 3), int), np.array([-1, 3]), np.zeros(2, int)),
    ],
    ids=[
        "rank1",
        "rank3",
        "no-column",
        "short",
        "lengths-rank2",
        "other-batch",
        "zero",
        "beyond",
        "negative",
    ],
)
def test_what_does_not_fit_is_refused(ids: IntArray, new: IntArray, read_before: IntArray) -> None:
    with pytest.raises(ShapeError):
        check_step(ids, new, read_before, VOCAB)


def test_unequal_rows_are_refused_without_a_mask() -> None:
    with pytest.raises(ShapeError, match="no mask"):
        RECURRENT.step(np.zeros((2, 3), int), np.array([3, 2]), RECURRENT.begin(2))


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**40])
def test_an_id_outside_the_vocabulary_is_named(bad: int) -> None:
    ids = np.array([[1, bad, 3]])
    with pytest.raises(TokenIdError, match=str(bad)):
        check_step(ids, np.array([3]), np.zeros(1, int), VOCAB)
    check_step(ids, np.array([1]), np.zeros(1, int), VOCAB)  # there it is padding


def test_join_of_unequal_growing_pasts_needs_a_mask() -> None:
    unmasked = Signature(CACHED.state, has_mask=False, has_positions=True, vocab_size=VOCAB)
    states = [
        ArrayState(
            {"past_key_values.0.key": np.zeros((1, 1, n, 2), int)}, np.ones((1, n), int), np.array([n])
        )
        for n in (2, 3)
    ]
    with pytest.raises(ShapeError, match="attention mask"):
        unmasked.join(states)


def test_names_of_the_state_that_follows() -> None:
    assert present_name("past_key_values.11.value") == "present.11.value"
    assert present_name("past_state.h.0") == "present_state.h.0"
    with pytest.raises(CorruptArtifactError, match="token_type_ids"):
        present_name("token_type_ids")


IDS = TensorSpec("input_ids", "int64", (BATCH, SEQUENCE))
LOGITS = TensorSpec("logits", "float32", (BATCH, SEQUENCE, VOCAB))


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ((), (LOGITS,), "input_ids"),
        ((IDS,), (), "logits"),
        ((IDS,), (TensorSpec("logits", "float32", (BATCH, SEQUENCE, "vocab")),), "must be a number"),
        ((IDS, TensorSpec("past_state.0", "float32", (BATCH, 4))), (LOGITS,), "present_state.0"),
        (
            (IDS, TensorSpec("past_state.0", "float32", (3, 4))),
            (LOGITS, TensorSpec("present_state.0", "float32", (3, 4))),
            "batch_size",
        ),
        (
            (IDS, TensorSpec("past_state.0", "float32", (BATCH, "odd"))),
            (LOGITS, TensorSpec("present_state.0", "float32", (BATCH, "odd"))),
            "odd",
        ),
        ((IDS, TensorSpec("token_type_ids", "int64", (BATCH, SEQUENCE))), (LOGITS,), "token_type_ids"),
    ],
    ids=["no-ids", "no-logits", "free-vocab", "no-present", "no-batch", "odd-axis", "odd-input"],
)
def test_a_graph_that_is_no_decoder_is_refused(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], words: str
) -> None:
    with pytest.raises(CorruptArtifactError, match=words):
        Signature.from_graph(inputs, outputs)


SOURCED = Signature.from_graph(
    [
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),
        TensorSpec("past_key_values.0.decoder.key", "float32", ("batch_size", 1, "past_sequence_length", 2)),
        TensorSpec(
            "past_key_values.0.encoder.key", "float32", ("batch_size", 1, "encoder_sequence_length", 2)
        ),
        TensorSpec("encoder_attention_mask", "int64", ("batch_size", "encoder_sequence_length")),
    ],
    [
        TensorSpec("logits", "float32", ("batch_size", "sequence_length", 8)),
        TensorSpec("present.0.decoder.key", "float32", ("batch_size", 1, "total_sequence_length", 2)),
    ],
)


@pytest.mark.parametrize("signature", [SOURCED, SOURCED.sharing_sources()], ids=["each its own", "shared"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_keep_their_sources_however_they_move(signature: Signature, data: st.DataObject) -> None:
    """Each row's source holds its own number, so that it shows whose it is."""

    def read(first: int, number: int) -> tuple[ArrayState, list[int]]:
        state = signature.begin(number)
        numbers = np.arange(first, first + number)
        state.sources = numbers
        width = data.draw(st.integers(1, 4))
        state.tensors["past_key_values.0.encoder.key"] = np.full(
            (number, 1, width, 2), 1.0, np.float32
        ) * numbers[:, None, None, None].astype(np.float32)
        state.tensors["encoder_attention_mask"] = np.ones((number, width), np.int64)
        return state, numbers.tolist()

    state, expected = read(1, data.draw(st.integers(1, 3)))
    for step in range(4):
        rows = np.array(data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=6)))
        if data.draw(st.booleans()):
            rows = np.repeat(rows, 2)
        state, expected = signature.select(state, rows), [expected[row] for row in rows]
        if data.draw(st.booleans()):
            other, more = read(10 * (step + 1), data.draw(st.integers(1, 2)))
            state, expected = signature.join([state, other]), expected + more
        state = signature.rewind(state, np.zeros(len(expected), np.int64))
        key = signature.held(state)["past_key_values.0.encoder.key"]
        assert key[:, 0, 0, 0].tolist() == expected
        assert list(signature.held(state)) == ["past_key_values.0.encoder.key"]
        stored = len(state.tensors["past_key_values.0.encoder.key"])
        assert stored == len(state.tensors["encoder_attention_mask"])
        assert stored == len(expected) // (together(np.array(expected)) if signature.shares_sources else 1)
