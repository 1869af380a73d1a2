"""The kit on a correct fake engine, and on forty ways to break it: each must be caught by its check."""

import unittest
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lmopt.contracts import EngineReport
from lmopt.errors import ConformanceError
from lmopt.registry import backends
from lmopt.signature import ArrayState, Signature
from lmopt.testing import ENGINE_CHECKS, SPEC_CHECKS, Case
from lmopt.testing.checks import check_name

CHECKS = {check_name(check): check for check in ENGINE_CHECKS}


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=check_name)
def test_a_correct_engine_passes(check: Callable[[Case], None], case: Case) -> None:
    if check_name(check) == "code_runs_only_when_trusted":
        with pytest.raises(unittest.SkipTest):
            check(case)
    else:
        check(case)


@pytest.mark.parametrize("check", SPEC_CHECKS, ids=check_name)
def test_a_correct_spec_passes(check: Callable[[str], None], fake: ModuleType) -> None:
    check("fake")


def test_every_check_states_its_rule_in_a_sentence() -> None:
    for check in (*ENGINE_CHECKS, *SPEC_CHECKS):
        assert (check.__doc__ or "").strip().endswith((".", "`.")), check.__name__


Methods = dict[str, Any]
Mutant = Callable[[ModuleType], Methods]
MUTANTS: dict[str, tuple[str, Mutant]] = {}


def breaks(check: str) -> Callable[[Mutant], Mutant]:
    """Note down a mutant and the check that must catch it."""

    def note(mutant: Mutant) -> Mutant:
        MUTANTS[mutant.__name__] = (check, mutant)
        return mutant

    return note


# Numbers ----------------------------------------------------------------------------------------


@breaks("agrees_with_reference")
def one_weight_scaled_by_a_percent(fake: ModuleType) -> Methods:
    def read_weights(self, request):
        weights = fake.FakeEngine.read_weights(self, request).copy()
        weights[1, 3] *= 1.01
        return weights

    return {"read_weights": read_weights}


@breaks("agrees_with_reference")
def logits_in_double_precision(fake: ModuleType) -> Methods:
    return {"give": lambda self, step, logits, last: step.align(logits, last_only=last).astype(np.float64)}


@breaks("batch_and_length_are_dynamic")
def long_rows_are_cut(fake: ModuleType) -> Methods:
    def graph(self, feeds, cache):
        logits, cache = fake.FakeEngine.graph(self, feeds, cache)
        logits[:, 32:] = 0
        return logits, cache

    return {"graph": graph}


@breaks("batch_and_length_are_dynamic")
def batch_of_one_loses_an_axis(fake: ModuleType) -> Methods:
    def give(self, step, logits, last):
        aligned = step.align(logits, last_only=last)
        return aligned[0] if len(aligned) == 1 else aligned

    return {"give": give}


@breaks("cached_decode_equals_full_forward")
def single_tokens_forget_the_past(fake: ModuleType) -> Methods:
    def graph(self, feeds, cache):
        if feeds["input_ids"].shape[1] == 1:
            cache = np.zeros_like(cache)
        return fake.FakeEngine.graph(self, feeds, cache)

    return {"graph": graph}


@breaks("cached_decode_equals_full_forward")
def positions_start_at_zero_in_every_call(fake: ModuleType) -> Methods:
    def graph(self, feeds, cache):
        logits, cache = fake.FakeEngine.graph(self, feeds, cache)
        wrong = np.sin(feeds["position_ids"] - feeds["position_ids"][:, :1])
        return (logits - np.sin(feeds["position_ids"])[..., None] + wrong[..., None]).astype(
            np.float32
        ), cache

    return {"graph": graph}


@breaks("several_tokens_at_once")
def several_tokens_after_a_past_see_only_the_first(fake: ModuleType) -> Methods:
    def graph(self, feeds, cache):
        old = cache.shape[2]
        logits, cache = fake.FakeEngine.graph(self, feeds, cache)
        if old and logits.shape[1] > 1:
            logits[:, 1:] = logits[:, :1]
        return logits, cache

    return {"graph": graph}


@breaks("several_tokens_at_once")
def tokens_of_one_call_see_the_future(fake: ModuleType) -> Methods:
    def graph(self, feeds, cache):
        logits, cache = fake.FakeEngine.graph(self, feeds, cache)
        if logits.shape[1] == 7:
            logits[:] = logits.mean(axis=1, keepdims=True)
        return logits, cache

    return {"graph": graph}


@breaks("capacity_is_a_hint")
def capacity_shifts_positions(fake: ModuleType) -> Methods:
    def begin(self, batch, *, capacity=None, padding_side="right"):
        state = fake.FakeEngine.begin(self, batch, padding_side=padding_side)
        if capacity == 40:
            state.lengths = state.lengths + 1
        return state

    return {"begin": begin}


@breaks("unequal_rows")
def padding_leaks_into_later_tokens(fake: ModuleType) -> Methods:
    def graph(self, feeds, cache):
        feeds = {**feeds, "attention_mask": np.ones_like(feeds["attention_mask"])}
        return fake.FakeEngine.graph(self, feeds, cache)

    return {"graph": graph}


@breaks("unequal_rows")
def left_padding_is_not_undone(fake: ModuleType) -> Methods:
    def give(self, step, logits, last):
        return step.align(logits, last_only=True) if last else logits.copy()

    return {"give": give}


@breaks("unequal_rows")
def lengths_count_padding(fake: ModuleType) -> Methods:
    def forward(self, input_ids, lengths, state, *, last_only=False):
        before = state.lengths
        logits, state = fake.FakeEngine.forward(self, input_ids, lengths, state, last_only=last_only)
        return logits, replace_lengths(state, before + input_ids.shape[1])

    return {"forward": forward}


@breaks("unequal_rows")
def declared_equal_only_but_accepts_unequal(fake: ModuleType) -> Methods:
    return {"ragged": False}


@breaks("padding_has_no_effect")
def padding_ids_are_looked_up(fake: ModuleType) -> Methods:
    def layout(self, input_ids, lengths, state):
        step = fake.SIGNATURE.step(input_ids, lengths, state)
        self.weights[0][input_ids]
        return step

    return {"layout": layout}


@breaks("last_only_is_the_last_position")
def last_only_is_off_by_one(fake: ModuleType) -> Methods:
    def give(self, step, logits, last):
        if not last:
            return step.align(logits, last_only=False)
        aligned = step.align(logits, last_only=False)
        return aligned[np.arange(len(aligned)), np.maximum(step.new - 2, 0)][:, None]

    return {"give": give}


@breaks("last_only_is_the_last_position")
def last_only_is_the_last_column(fake: ModuleType) -> Methods:
    def give(self, step, logits, last):
        aligned = step.align(logits, last_only=False).copy()
        aligned[np.arange(aligned.shape[1]) >= step.new[:, None]] = 7  # padding is undefined
        return aligned[:, -1:] if last else aligned

    return {"give": give}


@breaks("last_only_is_the_last_position")
def last_only_is_ignored(fake: ModuleType) -> Methods:
    return {"give": lambda self, step, logits, last: step.align(logits, last_only=False)}


@breaks("best_logits_are_those_of_forward")
def best_leaves_out_the_last(fake: ModuleType) -> Methods:
    return {"best": lambda self, line, count: np.sort(line.argsort()[-max(1, count - 1) :])}


@breaks("best_logits_are_those_of_forward")
def best_are_the_smallest(fake: ModuleType) -> Methods:
    return {"best": lambda self, line, count: np.sort(line.argsort()[:count])}


@breaks("best_logits_are_those_of_forward")
def best_come_by_rank(fake: ModuleType) -> Methods:
    return {"best": lambda self, line, count: line.argsort()[::-1][:count]}


@breaks("best_logits_are_those_of_forward")
def best_forgets_what_it_read(fake: ModuleType) -> Methods:
    def forward_best(self, input_ids, state, count):
        before = fake.FakeEngine.copy(self, state)
        logits, ids, _ = fake.FakeEngine.forward_best(self, input_ids, state, count)
        return logits, ids, before

    return {"forward_best": forward_best}


@breaks("best_logits_are_those_of_forward")
def best_takes_any_number(fake: ModuleType) -> Methods:
    return {
        "forward_best": lambda self, ids, state, count: fake.FakeEngine.forward_best(
            self, ids, state, min(max(count, 1), self.most_best)
        )
    }


# States -----------------------------------------------------------------------------------------


@breaks("select_keeps_reorders_repeats")
def select_ignores_the_order(fake: ModuleType) -> Methods:
    return {"select": lambda self, state, rows: fake.SIGNATURE.select(state, np.sort(rows))}


@breaks("select_keeps_reorders_repeats")
def select_drops_repeats(fake: ModuleType) -> Methods:
    return {
        "select": lambda self, state, rows: fake.SIGNATURE.select(state, np.array(list(dict.fromkeys(rows))))
    }


@breaks("select_keeps_reorders_repeats")
def select_moves_the_cache_but_not_the_lengths(fake: ModuleType) -> Methods:
    def select(self, state, rows):
        moved = fake.SIGNATURE.select(state, rows)
        return replace_lengths(moved, np.resize(state.lengths, len(rows)))

    return {"select": select}


@breaks("rewind_forgets_last_tokens")
def rewind_leaves_the_mask(fake: ModuleType) -> Methods:
    return {"rewind": lambda self, state, lengths: replace_lengths(state, np.array(lengths))}


@breaks("rewind_forgets_last_tokens")
def rewind_keeps_one_token_too_many(fake: ModuleType) -> Methods:
    def rewind(self, state, lengths):
        more = np.minimum(lengths + 1, state.lengths)
        return replace_lengths(fake.FakeEngine.rewind(self, state, more), lengths)

    return {"rewind": rewind}


@breaks("rewind_forgets_last_tokens")
def rewind_grants_more_than_was_read(fake: ModuleType) -> Methods:
    return {
        "rewind": lambda self, state, lengths: fake.FakeEngine.rewind(
            self, state, np.minimum(lengths, state.lengths)
        )
    }


@breaks("rewind_again_and_again")
def rewind_works_twice_only(fake: ModuleType) -> Methods:
    def rewind(self, state, lengths):
        self.rewound = getattr(self, "rewound", 0) + 1
        if self.rewound > 2:
            return replace_lengths(state, np.array(lengths))
        return fake.FakeEngine.rewind(self, state, lengths)

    return {"rewind": rewind}


@breaks("copy_is_independent")
def copy_takes_the_original_along(fake: ModuleType) -> Methods:
    def copy(self, state, *, capacity=None):
        copied = fake.FakeEngine.copy(self, state)
        state.tensors[fake.KEY][:] = 0
        return copied

    return {"copy": copy}


@breaks("copy_is_independent")
def copy_with_a_capacity_is_empty(fake: ModuleType) -> Methods:
    def copy(self, state, *, capacity=None):
        copied = fake.FakeEngine.copy(self, state)
        if capacity is not None:
            copied.tensors[fake.KEY][:] = 0
        return copied

    return {"copy": copy}


@breaks("unrewindable_state_says_so")
def a_state_that_cannot_rewind_pretends_to(fake: ModuleType) -> Methods:
    return {"rewinds": property(lambda self: False)}


@breaks("unrewindable_state_says_so")
def rewinds_is_a_word(fake: ModuleType) -> Methods:
    return {"rewinds": property(lambda self: "yes")}


@breaks("join_appends_rows")
def join_reverses_the_states(fake: ModuleType) -> Methods:
    return {"join": lambda self, states: fake.SIGNATURE.join(states[::-1])}


@breaks("join_appends_rows")
def join_forgets_the_last_state(fake: ModuleType) -> Methods:
    return {"join": lambda self, states: fake.SIGNATURE.join(states[:-1] or states)}


@breaks("join_appends_rows")
def join_pads_shorter_pasts_as_if_they_were_tokens(fake: ModuleType) -> Methods:
    def join(self, states):
        state = fake.SIGNATURE.join(states)
        state.mask = np.ones_like(state.mask)
        return state

    return {"join": join}


@breaks("joined_rows_can_be_split_again")
def select_after_join_takes_the_first_state_only(fake: ModuleType) -> Methods:
    def join(self, states):
        self.first = len(states[0].lengths)
        return fake.SIGNATURE.join(states)

    def select(self, state, rows):
        return fake.SIGNATURE.select(state, np.minimum(rows, self.first) if hasattr(self, "first") else rows)

    return {"join": join, "select": select}


@breaks("states_are_independent")
def one_cache_for_all_states(fake: ModuleType) -> Methods:
    def forward(self, input_ids, lengths, state, *, last_only=False):
        if state.mask.shape[1]:
            state.tensors[fake.KEY] = self.cache
        logits, after = fake.FakeEngine.forward(self, input_ids, lengths, state, last_only=last_only)
        self.cache = after.tensors[fake.KEY]
        return logits, after

    return {"forward": forward}


@breaks("threads_with_separate_states")
def forward_works_in_one_thread_at_a_time(fake: ModuleType) -> Methods:
    def forward(self, input_ids, lengths, state, *, last_only=False):
        import time

        self.state = state
        time.sleep(0.002)  # another thread comes in between
        return fake.FakeEngine.forward(self, input_ids, lengths, self.state, last_only=last_only)

    return {"forward": forward}


# Inputs -----------------------------------------------------------------------------------------


def accepting(fake: ModuleType, **changes: Any) -> Callable[[Any], Any]:
    """A factory that quietly replaces what it should refuse."""

    def open_engine(request):
        request = replace(request, **changes)
        fake.check_request(request)
        return fake.ENGINE(request)

    return open_engine


@breaks("unknown_option_is_refused")
def unknown_options_are_dropped(fake: ModuleType) -> Methods:
    return {"factory": accepting(fake, options={})}


@breaks("undeclared_device_and_dtype_are_refused")
def unknown_devices_fall_back_to_the_cpu(fake: ModuleType) -> Methods:
    return {"factory": accepting(fake, device="cpu")}


@breaks("undeclared_device_and_dtype_are_refused")
def other_types_are_computed_in_float32(fake: ModuleType) -> Methods:
    return {"factory": accepting(fake, dtype="float32")}


@breaks("threads_are_honoured")
def a_thread_count_is_dropped(fake: ModuleType) -> Methods:
    return {"factory": accepting(fake, threads=None)}


@breaks("ids_outside_the_vocabulary_are_refused")
def wrong_ids_wrap_around(fake: ModuleType) -> Methods:
    return {
        "layout": lambda self, ids, lengths, state: fake.SIGNATURE.step(
            ids % fake.VOCAB if ids.ndim == 2 else ids, lengths, state
        )
    }


@breaks("wrong_shapes_are_refused")
def a_single_row_is_reshaped(fake: ModuleType) -> Methods:
    return {
        "layout": lambda self, ids, lengths, state: (
            fake.SIGNATURE.step(np.atleast_2d(ids)[:2], lengths, state)
            if ids.ndim != 1
            else fake.SIGNATURE.step(np.tile(ids, (2, 1)), lengths, state)
        )
    }


@breaks("wrong_shapes_are_refused")
def lengths_are_clipped(fake: ModuleType) -> Methods:
    return {
        "layout": lambda self, ids, lengths, state: fake.SIGNATURE.step(
            ids, np.clip(lengths, 1, ids.shape[-1]) if ids.size else lengths, state
        )
    }


@breaks("ids_must_be_integers")
def fractions_are_cut_off(fake: ModuleType) -> Methods:
    def forward(self, input_ids, lengths, state, *, last_only=False):
        whole = (np.asarray(input_ids, np.int64), np.asarray(lengths, np.int64))
        return fake.FakeEngine.forward(self, *whole, state, last_only=last_only)

    return {"forward": forward}


@breaks("a_refusal_leaves_the_engine_usable")
def a_refusal_spoils_the_engine(fake: ModuleType) -> Methods:
    def layout(self, ids, lengths, state):
        try:
            return fake.SIGNATURE.step(ids, lengths, state)
        except Exception:
            self.weights = self.weights + 1
            raise

    return {"layout": layout}


# Life -------------------------------------------------------------------------------------------


@breaks("protocols_match_capabilities")
def taps_are_declared_but_absent(fake: ModuleType) -> Methods:
    return {"delete": ("tap_names", "taps")}


@breaks("protocols_match_capabilities")
def no_join(fake: ModuleType) -> Methods:
    return {"delete": ("join",)}


@breaks("taps_show_values")
def unknown_taps_are_left_out(fake: ModuleType) -> Methods:
    def taps(self, ids, names):
        return fake.FakeEngine.taps(self, ids, [name for name in names if name in self.tap_names()])

    return {"taps": taps}


def reports(**changes: Any) -> Mutant:
    """A mutant whose report lies."""

    def mutant(fake: ModuleType) -> Methods:
        def report(self) -> EngineReport:
            return replace(fake.FakeEngine.report(self), **changes)

        return {"report": report}

    return mutant


for _what, _changes in {
    "device": {"device": "cuda:0"},
    "dtype": {"dtype": "float16"},
    "auto_dtype": {"dtype": "auto"},
    "backend": {"backend": "onnxruntime"},
    "versions": {"versions": {"numpy": "0.0.1"}},
    "a_package_that_is_not_there": {"versions": {"lmopt-no-such-package": "1.0"}},
}.items():
    MUTANTS[f"report_lies_about_{_what}"] = ("report_is_truthful", reports(**_changes))


@breaks("auto_dtype_is_a_declared_one")
def auto_stays_auto(fake: ModuleType) -> Methods:
    return reports(dtype="auto")(fake)


@breaks("results_belong_to_the_caller")
def logits_are_a_view_of_a_buffer(fake: ModuleType) -> Methods:
    buffer = np.zeros(1 << 16, np.float32)

    def give(self, step, logits, last):
        aligned = step.align(logits, last_only=last)
        view = buffer[: aligned.size].reshape(aligned.shape)
        view[:] = aligned
        return view

    return {"give": give}


@breaks("results_belong_to_the_caller")
def the_state_holds_the_callers_ids(fake: ModuleType) -> Methods:
    def forward(self, input_ids, lengths, state, *, last_only=False):
        if hasattr(self, "seen") and state.mask.shape[1] == self.seen.shape[1]:
            state.tensors[fake.KEY] = self.weights[0][self.seen % fake.VOCAB][:, None]
        self.seen = input_ids
        return fake.FakeEngine.forward(self, input_ids, lengths, state, last_only=last_only)

    return {"forward": forward, "ragged": False}


@breaks("results_belong_to_the_caller")
def logits_are_read_only(fake: ModuleType) -> Methods:
    def give(self, step, logits, last):
        aligned = step.align(logits, last_only=last).copy()
        aligned.flags.writeable = False
        return aligned

    return {"give": give}


@breaks("results_belong_to_the_caller")
def padding_is_written_into_the_callers_ids(fake: ModuleType) -> Methods:
    def layout(self, ids, lengths, state):
        step = fake.SIGNATURE.step(ids, lengths, state)
        ids[:] = 0
        return step

    return {"layout": layout}


@breaks("two_engines_coexist")
def closing_one_engine_closes_all(fake: ModuleType) -> Methods:
    everywhere = {"closed": False}

    def close(self):
        everywhere["closed"] = True

    def check_open(self):
        if everywhere["closed"]:
            raise fake.ClosedError("closed")

    return {"close": close, "check_open": check_open}


@breaks("close_is_idempotent_and_reopenable")
def closing_twice_fails(fake: ModuleType) -> Methods:
    def close(self):
        self.check_open()
        self.closed = True

    return {"close": close}


@breaks("use_after_close_is_refused")
def use_after_close_is_accepted(fake: ModuleType) -> Methods:
    return {"check_open": lambda self: None}


@breaks("use_after_close_is_refused")
def use_after_close_is_an_attribute_error(fake: ModuleType) -> Methods:
    def check_open(self):
        if self.closed:
            raise AttributeError("'NoneType' object has no attribute 'run'")

    return {"check_open": check_open}


@breaks("tampered_artifact_is_refused")
def files_are_read_without_verification(fake: ModuleType) -> Methods:
    return {"read_weights": lambda self, request: np.load(request.artifact.path / "weights.npy")}


@breaks("missing_source_is_refused")
def a_missing_model_is_a_type_error(fake: ModuleType) -> Methods:
    return {"factory": lambda request: fake.ENGINE(request)}


def replace_lengths(state: ArrayState, lengths: Any) -> ArrayState:
    return ArrayState(state.tensors, state.mask, lengths, state.padding_side)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_engine_is_caught(
    name: str, case: Case, fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, mutant = MUTANTS[name]
    changes = mutant(fake)
    if factory := changes.pop("factory", None):
        monkeypatch.setattr(fake, "open_engine", factory)
    for method in changes.pop("delete", ()):
        monkeypatch.delattr(fake.FakeEngine, method)
    monkeypatch.setattr(fake, "ENGINE", type("Mutant", (fake.FakeEngine,), changes))
    with pytest.raises(Exception) as caught:  # noqa: PT011 (a crash of the engine is a failed check too)
        CHECKS[check](case)
    assert not isinstance(caught.value, unittest.SkipTest)


def test_every_engine_check_is_shown_to_bite() -> None:
    shown = {check for check, _ in MUTANTS.values()}
    assert set(CHECKS) - shown == {"code_runs_only_when_trusted"}  # its mutant stands below


def test_code_that_runs_untrusted_is_caught(
    case: Case, fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = replace(fake.BACKEND, can=replace(fake.BACKEND.can, features=frozenset({"taps", "trust"})))
    backends.register(trusting)
    try:
        opened = []

        def open_engine(request):
            opened.append(dict(request.options))
            engine = fake.FakeEngine(replace(request, options={}))
            engine.weights = engine.weights * (1 if request.options.get("trust") else 2)
            return engine

        monkeypatch.setattr(fake, "open_engine", open_engine)
        with pytest.raises(ConformanceError, match="without trust"):
            CHECKS["code_runs_only_when_trusted"](case)
        CHECKS["agrees_with_reference"](case)
        assert opened == [{}, {"trust": True}]
    finally:
        backends.unregister("fake")


def test_float16_that_is_float32_in_truth_is_caught(
    case: Case, fake: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "open_engine", lambda request: fake.FakeEngine(request))
    with pytest.raises(ConformanceError, match="precision of float32"):
        CHECKS["agrees_with_reference"](replace(case, dtype="float16"))


def test_the_signature_is_what_the_fake_is_judged_by(fake: ModuleType) -> None:
    assert isinstance(fake.SIGNATURE, Signature)
