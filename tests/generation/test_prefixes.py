"""Kept prefixes: read once, never a different token, bounded, and gone when they must be."""

import threading

import numpy as np
import pytest
from generation_fakes import ByteTokenizer, HashEngine, RewindEngine

from lmopt.errors import UnsupportedOptionError
from lmopt.generation import GenerationConfig, Limits, PrefixReport, PrefixStore, Workspace, generate, stream
from lmopt.generation.prefixes import shared

SYSTEM = list(range(4, 44))
CONFIG = GenerationConfig(max_new_tokens=8)


def keeping(tokens=1000, **limits):
    return Workspace(Limits(**limits), PrefixStore(tokens))


def fresh(rows, config=CONFIG):
    return [generate(HashEngine(), [row], config)[0] for row in rows]


def test_shared_counts_the_common_start():
    for one, other, expected in [
        ([], [1], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 4, 3], 1),
        ([5], [6], 0),
    ]:
        assert shared(np.array(one, np.int64), np.array(other, np.int64)) == expected


def test_a_growing_chat_is_read_once():
    engine, workspace = RewindEngine(), keeping()
    text, expected_reads = list(SYSTEM), 0
    for turn in range(4):
        text = [*text, 1, 2, 3 + turn]
        before = engine.read
        ((answer,),) = generate(engine, [text], CONFIG, workspace=workspace)
        assert [[answer]] == fresh([text])
        # The last token of an answer is chosen, not read: it is read with the next turn.
        expected_reads = (len(text) if turn == 0 else 3 + 1) + 7
        assert engine.read - before == expected_reads
        text += answer.token_ids
    report = workspace.prefixes.report()
    assert (report.requests, report.hits, report.entries, report.tokens) == (4, 3, 1, len(text) - 1)
    assert len(engine.alive) == 1


def test_a_system_prompt_is_found_in_what_was_kept_and_the_rest_is_rewound():
    engine, workspace = RewindEngine(), keeping()
    for number, row in enumerate([[*SYSTEM, 1, 2, 3], [*SYSTEM, 2, 2], [*SYSTEM, 3]]):
        before = engine.read
        assert generate(engine, [row], CONFIG, workspace=workspace) == fresh([row])
        assert engine.read - before == 7 + len(row) - (len(SYSTEM) if number else 0)
    assert workspace.prefixes.report().reused == 2 * len(SYSTEM)
    # The very same prompt again: its last token is read for the logits.
    before = engine.read
    generate(engine, [[*SYSTEM, 3]], CONFIG, workspace=workspace)
    assert engine.read - before == 7 + 1


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 16}, {"max_num_seqs": 2}], ids=repr)
def test_what_prompts_of_one_request_share_is_read_once(limits, ragged):
    rows = [[*SYSTEM, 1, number] for number in range(6)] + [[1, 2, 3], [*SYSTEM[:20], 45, 46]]
    engine, workspace = RewindEngine(ragged=ragged), keeping(**limits)
    options = {"do_sample": True, "seed": 3, "num_return_sequences": 2}
    for config in (CONFIG, CONFIG.with_options(**options)):
        engine.read = 0
        assert generate(engine, rows, config, workspace=workspace) == fresh(rows, config)
        decoded = 7 * len(rows) * config.num_return_sequences
        assert engine.read - decoded <= len(SYSTEM) + 2 + 5 * 2 + 3 + 3
    assert not {state for state in engine.alive if state.consumed}


def test_without_a_store_a_prompt_is_always_read_in_the_same_calls():
    engine = RewindEngine()
    rows = [[*SYSTEM, 1], [*SYSTEM, 2]]
    generate(engine, rows, CONFIG)
    generate(engine, rows, CONFIG)
    assert engine.calls[:8] == engine.calls[8:]
    assert not engine.alive


def test_the_least_recently_used_goes_first():
    engine, store = RewindEngine(), PrefixStore(100)
    workspace = Workspace(prefixes=store)
    one = GenerationConfig(max_new_tokens=1)
    texts = [[number] * 30 + [number + 1] for number in range(5, 9)]
    for text in texts[:3]:
        generate(engine, [text], one, workspace=workspace)
    assert (store.report().entries, store.report().tokens) == (3, 93)
    generate(engine, [texts[0]], one, workspace=workspace)  # used again
    generate(engine, [texts[3]], one, workspace=workspace)
    assert store.report().tokens <= 100
    hits = store.report().hits
    for text, found in [(texts[0], 1), (texts[1], 0)]:
        assert (store.take(engine, np.array(text), 50)[0] > 0) == bool(found)
    assert store.report().hits == hits + 1
    # What is longer than the whole store is not kept, and pushes nothing out.
    generate(engine, [[3] * 120], one, workspace=workspace)
    assert store.report().entries == 3


def test_a_kept_state_holds_no_more_room_than_tokens():
    engine, workspace = RewindEngine(), keeping()
    config = GenerationConfig(max_new_tokens=100, eos_token_id=list(range(25)))
    ((found,),) = generate(engine, [SYSTEM], config, workspace=workspace)
    (kept,) = engine.alive
    assert kept.capacity == len(SYSTEM) + len(found.token_ids) - 1 == kept.lengths[0]


def test_short_texts_are_not_kept():
    workspace = keeping()
    engine = RewindEngine()
    generate(engine, [[1, 2, 3]], CONFIG, workspace=workspace)
    assert workspace.prefixes.report() == PrefixReport(1000, 0, 0, 1, 0, 0)
    assert not engine.alive


def test_cancelled_and_abandoned_streams_leave_nothing():
    engine, workspace = RewindEngine(vocab_size=200), keeping()
    tokenizer = ByteTokenizer([bytes([n]) for n in range(200)])
    config = GenerationConfig(max_new_tokens=50)
    event = threading.Event()
    running = stream(engine, SYSTEM, config, tokenizer=tokenizer, workspace=workspace, cancel=event)
    next(running)
    event.set()
    list(running)
    running = stream(engine, SYSTEM, config, tokenizer=tokenizer, workspace=workspace)
    next(running)
    running.close()
    assert not engine.alive
    assert workspace.prefixes.report().entries == 0


def test_nothing_is_kept_after_clear():
    engine, workspace = RewindEngine(), keeping()
    generate(engine, [SYSTEM], CONFIG, workspace=workspace)
    assert engine.alive
    workspace.prefixes.clear()
    assert not engine.alive
    generate(engine, [SYSTEM], CONFIG, workspace=workspace)
    assert not engine.alive


def test_an_engine_that_cannot_rewind_reads_everything():
    workspace = keeping()
    for engine in (HashEngine(), RewindEngine(rewinds=False)):
        for _ in range(2):
            assert generate(engine, [SYSTEM], CONFIG, workspace=workspace) == fresh([SYSTEM])
    assert workspace.prefixes.report().entries == 0


def test_threads_share_a_store():
    engine, workspace = RewindEngine(), keeping(120)
    rows = [[*SYSTEM[: 20 + number], number, 1, 2] for number in range(12)]
    expected = fresh(rows)
    wrong = []

    def work(start):
        for number in range(30):
            place = (start * 5 + number) % len(rows)
            if generate(engine, [rows[place]], CONFIG, workspace=workspace)[0] != expected[place]:
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    report = workspace.prefixes.report()
    assert report.tokens <= 120
    assert report.requests == 240
    assert report.hits > 100


@pytest.mark.parametrize("limit", [-1, 1.5, True, None])
def test_impossible_sizes(limit):
    with pytest.raises(UnsupportedOptionError, match="prefix_cache_tokens"):
        PrefixStore(limit)
