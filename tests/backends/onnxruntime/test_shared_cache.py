import threading

import numpy as np
import pytest

from lmopt.backends.onnxruntime import rooms, shared_cache
from lmopt.errors import ClosedError, ContextLengthError, InsufficientMemoryError
from lmopt.testing import models

VOCAB, CONTEXT = models.VOCAB_SIZE, models.CONTEXT_LENGTH


def draw(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, length) for length in lengths]


def feed(engine, rows, state, *, last_only=False):
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), -100)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    logits, state = engine.forward(ids, lengths, state, last_only=last_only)
    return [one[: 1 if last_only else n] for one, n in zip(logits, lengths, strict=True)], state


def read(engine, calls, capacity=None):
    """Logits of rows over several calls: `calls[call][row]` are ids."""
    state = engine.begin(len(calls[0]), capacity=capacity)
    results = []
    for rows in calls:
        logits, state = feed(engine, rows, state)
        results.append(logits)
    return [np.concatenate([call[row] for call in results]) for row in range(len(calls[0]))]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", [[7, 7], [5, 17, 40, 2], [3, 9, 33, 64, 12, 50, 7, 1]])
def test_a_row_is_the_same_bit_for_bit_alone_and_in_any_batch(opened, lengths, threads):
    engine = opened(threads=threads)
    calls = [
        draw(lengths),
        draw([1] * len(lengths), 1),
        draw([3 if n % 2 else 1 for n in lengths], 2),
        draw([1] * len(lengths), 3),
    ]
    together = read(engine, calls)
    order = np.random.default_rng(4).permutation(len(lengths))
    permuted = read(engine, [[rows[row] for row in order] for rows in calls], capacity=100)
    for row in range(len(lengths)):
        alone = read(engine, [[rows[row]] for rows in calls], capacity=90 + row)[0]
        assert np.array_equal(together[row], alone)
        assert np.array_equal(permuted[order.tolist().index(row)], alone)


def test_calls_of_two_or_more_tokens_may_be_split_anyhow(opened):
    engine, (row,) = opened(), draw([40])
    whole = read(engine, [[row]])[0]
    for parts in ([20, 20], [2] * 20, [38, 2], [33, 3, 4], [35, 2, 3]):
        assert np.array_equal(
            read(engine, [[part] for part in np.split(row, np.cumsum(parts)[:-1])])[0], whole
        )


def test_deterministic_calls_may_be_split_anyhow(opened):
    engine = opened(deterministic=True)
    rows = draw([40, 40, 40])
    whole = read(engine, [rows], capacity=40)
    for parts in ([1] * 40, [39, 1], [1, 38, 1], [20, 20]):
        edges = np.cumsum(parts)[:-1]
        calls = list(zip(*(np.split(row, edges) for row in rows), strict=True))
        assert all(map(np.array_equal, read(engine, calls, capacity=40), whole))
        assert np.array_equal(read(engine, [call[1:2] for call in calls])[0], whole[1])


def test_long_prompts_are_read_in_parts_with_the_same_result(opened, monkeypatch):
    engine = opened()
    rows, more = draw([61, 9, 33]), draw([1, 1, 1], 1)
    expected, last = read(engine, [rows, more]), feed(engine, rows, engine.begin(3), last_only=True)[0]
    widths = []
    run = shared_cache.Binding.run
    monkeypatch.setattr(shared_cache, "_MOST_TOKENS", 12)
    monkeypatch.setattr(
        shared_cache.Binding,
        "run",
        lambda self, ids, *rest: widths.append(ids.shape) or run(self, ids, *rest),
    )
    assert all(map(np.array_equal, read(engine, [rows, more]), expected))
    assert max(batch * width for batch, width in widths) <= 12
    assert min(width for batch, width in widths[:-1]) > 1
    assert all(map(np.array_equal, feed(engine, rows, engine.begin(3), last_only=True)[0], last))


def test_only_logits_that_are_asked_for_are_computed(opened, monkeypatch):
    engine = opened()
    kept = []
    run = shared_cache.Binding.run
    monkeypatch.setattr(
        shared_cache.Binding, "run", lambda self, *given: kept.append(given[-1].shape[1]) or run(self, *given)
    )
    for lengths in ([30], [30, 30], [30, 28, 29]):
        full = feed(engine, draw(lengths), engine.begin(len(lengths)))[0]
        last = feed(engine, draw(lengths), engine.begin(len(lengths)), last_only=True)[0]
        assert all(np.array_equal(one[-1:], other) for one, other in zip(full, last, strict=True))
    assert kept == [30, 1, 30, 1, 30, 3]


def test_the_cache_grows_up_to_the_context_and_no_further(opened):
    engine = opened()
    (row,) = draw([CONTEXT])
    expected = read(engine, [[row]], capacity=CONTEXT)[0]
    state = engine.begin(1)
    assert state.room.capacity < CONTEXT
    parts = []
    for part in np.split(row, range(2, CONTEXT, 2)):
        logits, state = feed(engine, [part], state)
        parts.append(logits[0])
    assert np.array_equal(np.concatenate(parts), expected)
    assert state.room.capacity == CONTEXT
    with pytest.raises(ContextLengthError, match=f"{CONTEXT + 1} tokens; the model's context is {CONTEXT}"):
        feed(engine, draw([1]), state)
    with pytest.raises(ContextLengthError, match="would hold 200"):
        engine.begin(1, capacity=200)


@pytest.mark.parametrize("deterministic", [False, True])
def test_padding_at_the_end_of_the_context_does_no_harm(opened, deterministic):
    engine = opened(deterministic=deterministic)
    first, second = draw([CONTEXT - 1, 20]), draw([1, 5], 1)
    together = read(engine, [first, second])
    for row in (0, 1):
        assert np.array_equal(read(engine, [[first[row]], [second[row]]])[0], together[row])


def test_a_tight_capacity_is_not_outgrown_by_padding(opened):
    engine = opened()
    state = engine.begin(2, capacity=20)
    _, state = feed(engine, draw([19, 4]), state)
    logits, state = feed(engine, draw([1, 6], 1), state)
    assert state.room.capacity == 21
    assert np.array_equal(logits[1], read(engine, [[draw([19, 4])[1]], [draw([1, 6], 1)[1]]])[0][-6:])


def test_rows_that_stay_in_place_are_not_copied(opened, monkeypatch):
    engine = opened()
    _, state = feed(engine, draw([4, 5, 6, 7]), engine.begin(4))
    room = state.room
    monkeypatch.setattr(rooms.Room, "take", lambda *_: pytest.fail("copied"))
    state = engine.select(state, np.array([0, 1, 2, 3]))
    state = engine.select(state, np.array([1, 2, 3]))
    state = engine.select(state, np.array([0, 1]))
    assert state.room is room
    assert state.lengths.tolist() == [5, 6]
    (alone,) = read(engine, [draw([4, 5, 6, 7])[2:3], draw([1], 1)])
    monkeypatch.undo()
    logits, _ = feed(engine, [draw([1], 2)[0], draw([1], 1)[0]], state)
    assert np.array_equal(logits[1], alone[-1:])


def test_a_row_enters_a_place_that_is_free(opened, monkeypatch):
    engine = opened()
    rows = draw([4, 5, 6])
    _, state = feed(engine, rows, engine.begin(3, capacity=20))
    state = engine.select(state, np.array([0, 1]))
    _, new = feed(engine, draw([8], 1), engine.begin(1, capacity=20))
    room, taken = state.room, []
    take = rooms.Room.take
    monkeypatch.setattr(rooms.Room, "take", lambda self, *rest: taken.append(rest[0]) or take(self, *rest))
    state = engine.join([state, new])
    assert state.room is room
    assert taken == [2]
    calls = [rows[0], rows[1], draw([8], 1)[0]]
    logits, _ = feed(engine, draw([1, 1, 1], 2), state)
    for row in range(3):
        (alone,) = read(engine, [[calls[row]], [draw([1, 1, 1], 2)[row]]])
        assert np.array_equal(logits[row], alone[-1:])


def test_states_that_do_not_fit_memory_are_refused_and_the_engine_lives(opened, monkeypatch):
    engine = opened()
    monkeypatch.setattr(rooms, "_WORTH_ASKING", 0)
    monkeypatch.setattr(rooms, "memory_available_bytes", lambda: 1 << 20)
    with pytest.raises(InsufficientMemoryError, match="64 rows of 128 tokens needs 4 MiB"):
        engine.begin(64, capacity=128)
    _, state = feed(engine, draw([6]), engine.begin(1))
    monkeypatch.setattr(rooms, "memory_available_bytes", lambda: 100)
    with pytest.raises(InsufficientMemoryError, match="logits of 1 rows of 6 tokens"):
        feed(engine, draw([6]), state)


def test_closing_stops_a_run_that_is_inside(opened, monkeypatch):
    engine = opened()
    started, errors = threading.Event(), []

    def work():
        state = engine.begin(1, capacity=CONTEXT)
        try:
            while True:
                _, state = feed(engine, draw([60]), state)
                state = engine.rewind(state, np.zeros(1, np.int64))
                started.set()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(60)
    engine.close()
    for thread in threads:
        thread.join(60)
    assert [type(error) for error in errors] == [ClosedError] * 4


def test_closing_lets_go_of_the_session_though_states_live(opened):
    engine = opened()
    _, state = feed(engine, draw([6]), engine.begin(1))
    (binding,) = state.bindings.values()
    engine.close()
    assert binding._session is None
    assert binding._io is None
    with pytest.raises(ClosedError):
        feed(engine, draw([1]), state)


def test_threads_with_states_of_their_own_compute_what_one_computes(opened):
    engine = opened(threads=2)
    rows = draw([20] * 8)
    expected = [read(engine, [[row[:5]], *([token] for token in row[5:, None])])[0] for row in rows]
    wrong = []

    def work(number):
        for _ in range(5):
            row = rows[number]
            given = read(engine, [[row[:5]], *([token] for token in row[5:, None])])[0]
            if not np.array_equal(given, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
