"""Continuous batching: who enters when, what it costs, and that nobody's tokens change by it."""

import dataclasses
import itertools
import logging
import time

import numpy as np
import pytest
from generation_fakes import ByteTokenizer, HashEngine, RewindEngine, ScriptEngine

from lmopt.errors import EngineError, TokenizerError, UnsupportedOptionError
from lmopt.generation import GenerationConfig, Limits, Workspace, generate

MODES = [
    {},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 3, "num_return_sequences": 3, "top_p": 0.8},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logprobs": 2},
]


def prompts(count, longest=24, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(4, 50, generator.integers(1, longest)).tolist() for _ in range(count)]


def within(seqs=32, batched=512, cache=32768):
    return Workspace(Limits(seqs, batched, cache))


@pytest.mark.parametrize("limits", [(1, 512), (2, 7), (5, 16), (3, 1), (7, 40)], ids=repr)
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("mode", MODES, ids=repr)
def test_limits_change_no_token(mode, ragged, limits):
    config = GenerationConfig(max_new_tokens=9, eos_token_id=[3, 30, 31, 32, 33], **mode)
    rows = prompts(11)
    alone = [generate(HashEngine(ragged=ragged), [row], config)[0] for row in rows]
    engine = HashEngine(ragged=ragged)
    assert generate(engine, rows, config, workspace=within(*limits)) == alone
    assert len({len(one.token_ids) for found in alone for one in found}) > 2
    assert max(batch for batch, _ in engine.calls) <= limits[0]
    assert all(batch * width <= limits[1] for batch, width in engine.calls if width > 1)


def test_waiting_rows_enter_as_soon_as_others_leave():
    engine = ScriptEngine(vocab_size=9, script=[1, 2, 3, 4, 5, 6])
    config = [GenerationConfig(max_new_tokens=count) for count in (2, 6, 3, 1, 4)]
    found = generate(engine, [[0]] * 5, config, workspace=within(seqs=2))
    assert [one.token_ids for (one,) in found] == [[1, 2], [1, 2, 3, 4, 5, 6], [1, 2, 3], [1], [1, 2, 3, 4]]
    # Two rows in every step but the last ones: 6 tokens of row 1, the others beside it.
    prefills = [call for call in engine.calls if call == (1, 1)]
    assert [batch for batch, _ in engine.calls].count(2) >= 6
    assert len(engine.calls) <= 12
    assert prefills


def test_a_long_prompt_is_read_in_parts_between_the_steps_of_others():
    engine = HashEngine()
    config = GenerationConfig(max_new_tokens=12)
    rows = [[1, 2, 3], list(range(4, 44)) * 2]
    alone = [generate(HashEngine(), [row], config)[0] for row in rows]
    seen = []
    found = generate(
        engine, rows, config, workspace=within(batched=8), on_token=lambda token: seen.append(token.prompt)
    )
    assert found == alone
    # Ten parts, and a token of the short row between two of them.
    assert engine.calls.count((1, 8)) == 10
    assert seen[:10] == [0] * 10
    between = [width for _, width in engine.calls]
    assert all(a != b for a, b in itertools.pairwise(between[1:20]))


def test_prompts_of_like_length_are_read_together_and_others_are_not_padded_to_the_longest():
    engine = HashEngine()
    rows = [[1] * 5, [2] * 100, [3] * 7, [4] * 101, [5] * 99]
    generate(engine, rows, GenerationConfig(max_new_tokens=1))
    assert sorted(engine.calls) == [(2, 7), (3, 101)]


def test_reserved_cache_is_bounded():
    config = GenerationConfig(max_new_tokens=10)
    rows = [[1] * 10, [2] * 10, [3] * 90, [4] * 10]
    engine = HashEngine(context_length=200)
    expected = [generate(HashEngine(), [row], config)[0] for row in rows]
    assert generate(engine, rows, config, workspace=within(cache=40)) == expected
    assert max(batch for batch, _ in engine.calls) == 2
    # A state that does not grow needs no room.
    engine = HashEngine(context_length=None)
    generate(engine, rows, config, workspace=within(cache=40))
    assert max(batch for batch, _ in engine.calls) == 4


def test_more_sequences_than_rows_may_run():
    config = GenerationConfig(max_new_tokens=5, do_sample=True, seed=1, num_return_sequences=5)
    engine = HashEngine()
    found = generate(engine, [[1, 2], [3]], config, workspace=within(seqs=2))
    assert found == generate(HashEngine(), [[1, 2], [3]], config)
    assert max(batch for batch, _ in engine.calls) == 2


def test_states_are_let_go_of_when_a_row_leaves():
    engine = RewindEngine()
    config = [GenerationConfig(max_new_tokens=count) for count in (1, 30, 2, 3)]
    most = []
    generate(engine, prompts(4), config, on_token=lambda token: most.append(len(engine.alive)))
    assert max(most) <= 2
    assert not engine.alive
    most.clear()
    generate(engine, [[1, 2]], config[1], on_token=lambda token: most.append(len(engine.alive)))
    assert set(most) == {1}  # not the one that the prompt left behind, either


def test_configs_may_differ_by_prompt():
    configs = [
        GenerationConfig(max_new_tokens=4),
        GenerationConfig(max_new_tokens=7, do_sample=True, seed=5, top_k=0),
        GenerationConfig(max_new_tokens=2, logprobs=1, repetition_penalty=2.0),
        GenerationConfig(max_new_tokens=3, do_sample=True, seed=6, num_return_sequences=2),
    ]
    rows = prompts(4)
    found = generate(HashEngine(), rows, configs)
    assert found == [generate(HashEngine(), [row], one)[0] for row, one in zip(rows, configs, strict=True)]
    with pytest.raises(UnsupportedOptionError, match="2 configs were given for 4"):
        generate(HashEngine(), rows, configs[:2])
    with pytest.raises(UnsupportedOptionError, match=r"num_beams > 1.* must all have the same"):
        generate(HashEngine(), rows[:2], [GenerationConfig(num_beams=2), GenerationConfig()])


@pytest.mark.parametrize("name", [one.name for one in dataclasses.fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_impossible_limits(name, value):
    with pytest.raises(UnsupportedOptionError, match=name):
        Limits(**{name: value})


# Errors of one row ------------------------------------------------------------------------------


@dataclasses.dataclass
class PoisonEngine(HashEngine):
    """Gives NaN to a row that has read token 49."""

    def forward(self, input_ids, lengths, state, *, last_only=False):
        logits, state = super().forward(input_ids, lengths, state, last_only=last_only)
        for row, ids in enumerate(input_ids.tolist()):
            if 49 in ids[: int(lengths[row])]:
                logits[row] = np.nan
        return logits, state


@pytest.mark.parametrize("mode", MODES, ids=repr)
def test_nan_of_one_row_is_that_rows_error(mode, caplog):
    config = GenerationConfig(max_new_tokens=6, suppress_tokens=[49], **mode)
    rows = [[1, 2], [5, 49], [7, 8, 9]]
    with caplog.at_level(logging.WARNING):
        first, bad, last = generate(PoisonEngine(), rows, config)
    assert [first] == generate(PoisonEngine(), rows[:1], config)
    assert [last] == generate(PoisonEngine(), rows[2:], config)
    assert {one.finish_reason for one in bad} == {"error"}
    assert all(isinstance(one.error, EngineError) and "NaN" in str(one.error) for one in bad)
    assert all(one.token_ids == [] for one in bad)
    assert "prompt 1" in caplog.text
    for given in (rows[1:2], [rows[1], [49]]):
        with pytest.raises(EngineError, match="NaN"):
            generate(PoisonEngine(), given, config)


def test_tokens_before_an_error_are_kept():
    engine = ScriptEngine(vocab_size=5, script=[1, 2, 3, 4])
    # The third new token of row 1 would be the second 1: nothing is left then.
    config = [
        GenerationConfig(max_new_tokens=4),
        GenerationConfig(max_new_tokens=4, suppress_tokens=[0, 1, 3, 4], no_repeat_ngram_size=1),
    ]
    good, bad = (one for (one,) in generate(engine, [[0], [0]], config))
    assert good.token_ids == [1, 2, 3, 4]
    assert (bad.token_ids, bad.finish_reason) == ([2], "error")
    assert isinstance(bad.error, UnsupportedOptionError)


def test_a_tokenizer_that_fails_hurts_one_row_only():
    class Fails(ByteTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            if 3 in ids:
                raise KeyError("no such piece")
            return super().decode(ids, skip_special_tokens)

    tokenizer = Fails([bytes([97 + n]) for n in range(9)])
    engine = ScriptEngine(vocab_size=9, script=[1, 2, 3, 4])
    for stops in (None, ["zz"]):
        config = [GenerationConfig(max_new_tokens=count, stop_strings=stops) for count in (2, 4)]
        good, bad = (one for (one,) in generate(engine, [[0], [0]], config, tokenizer=tokenizer))
        assert (good.text, good.error) == ("bc", None)
        assert (bad.text, bad.finish_reason) == (None, "error")
        assert bad.token_ids == ([1, 2, 3] if stops else [1, 2, 3, 4])
        assert isinstance(bad.error, TokenizerError)
        assert "no such piece" in str(bad.error)


def test_a_call_that_fails_ends_the_request():
    class Breaks(HashEngine):
        def forward(self, *arguments, **options):
            if len(self.calls) == 3:
                raise EngineError("out of memory")
            return super().forward(*arguments, **options)

    with pytest.raises(EngineError, match="out of memory"):
        generate(Breaks(), [[1], [2]], GenerationConfig(max_new_tokens=9))


# Interruptions ----------------------------------------------------------------------------------


class After:
    """Set once it has been asked so many times."""

    def __init__(self, times):
        self.times = times

    def is_set(self):
        self.times -= 1
        return self.times < 0


def test_each_prompt_may_have_its_own_cancel():
    config = GenerationConfig(max_new_tokens=10)
    rows = prompts(3)
    whole = generate(HashEngine(), rows, config)
    engine = HashEngine()
    found = generate(engine, rows, config, cancel=[None, After(4), None])
    assert [found[0], found[2]] == [whole[0], whole[2]]
    assert found[1][0].finish_reason == "cancelled"
    assert found[1][0].token_ids == whole[1][0].token_ids[: len(found[1][0].token_ids)]
    assert 0 < len(found[1][0].token_ids) < 10
    assert {batch for batch, _ in engine.calls} >= {2, 3}
    with pytest.raises(UnsupportedOptionError, match="2 cancels were given for 3"):
        generate(HashEngine(), rows, config, cancel=[None, None])


def test_a_waiting_row_can_be_cancelled_and_so_can_one_that_is_being_read():
    config = GenerationConfig(max_new_tokens=5)
    rows = [[1], [2] * 30, [3]]
    found = generate(
        HashEngine(), rows, config, cancel=[None, After(3), After(1)], workspace=within(seqs=2, batched=4)
    )
    assert [one.finish_reason for (one,) in found] == ["length", "cancelled", "cancelled"]
    assert [len(one.token_ids) for (one,) in found] == [5, 0, 0]


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}], ids=repr)
def test_max_time_returns_what_is_there(mode, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(HashEngine):
        def forward(self, *arguments, **options):
            now[0] += 1.0
            return super().forward(*arguments, **options)

    config = GenerationConfig(max_new_tokens=50, max_time=4.5, **mode)
    for (one,) in generate(Slow(), [[1], [2]], config):
        assert (len(one.token_ids), one.finish_reason) == (5, "time")
    # The token that is being computed then is kept, as in transformers.
    ((one,),) = generate(Slow(), [[1]], config.with_options(max_time=1e-9))
    assert (len(one.token_ids), one.finish_reason) == (1, "time")


def test_max_time_is_each_rows_own(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    configs = [GenerationConfig(max_new_tokens=6, max_time=limit) for limit in (2.5, None)]
    found = generate(
        HashEngine(), [[1], [2]], configs, on_token=lambda token: now.__setitem__(0, now[0] + 0.5)
    )
    assert [one.finish_reason for (one,) in found] == ["time", "length"]
    assert len(found[0][0].token_ids) == 3


def test_closing_the_steps_lets_go_of_everything():
    engine = RewindEngine()

    def stop(token):
        raise InterruptedError

    with pytest.raises(InterruptedError) as caught:
        generate(engine, prompts(3), GenerationConfig(max_new_tokens=9), on_token=stop)
    del caught
    assert not engine.alive
