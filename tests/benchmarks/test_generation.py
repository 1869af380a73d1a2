"""`benchmarks/generation.py`: one run with lmopt alone, and the parts that decide what is reported."""

import copy
import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness.candidates import model_key, our_candidate, peers
from harness.measure import Conditions, Lock, measure
from harness.table import markdown, table
from harness.texts import Workload
from harness.weights import bytes_a_token
from harness.worker import Worker, WorkerError

from generation import agreement, best_settings, thread_counts
from lmopt.errors import InputError

REFERENCE, EXPORTED = "lmopt torch fp32", "lmopt onnxruntime portable fp32"
WORDS = "--prompt 40 --new 12 --batch 3 --rounds 2 --load-rounds 1 --retries 0 --no-roofline --quality 48"


@pytest.fixture(scope="module")
def result(benchmarks, tiny, text, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    command = [sys.executable, benchmarks / "generation.py", tiny, *WORDS.split()]
    command += ["--text", text, "--peers", place / "none", "--json", place / "out.json"]
    command += ["--lock", place / "lock", "--only", EXPORTED, "--only", "onnxruntime-genai fp32"]
    done = subprocess.run(
        command,
        env={**os.environ, "LMOPT_CACHE": str(place / "cache")},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "out.json").read_text()), done.stdout


def test_every_program_runs(result):
    found, shown = result
    [programs] = found["workloads"].values()
    assert set(programs) == {REFERENCE, EXPORTED}
    for one in programs.values():
        assert one["problem"] is None
        assert one["speed"]["rounds"] == 2
        assert one["speed"]["batch"] == 3
        assert one["speed"]["prompt_tokens"] == 40
        assert one["speed"]["total_tokens_per_s"]["median"] > 0
    assert f"| {EXPORTED} |" in shown


def test_float32_gives_the_tokens_of_the_reference(result):
    found, _ = result
    for programs in found["workloads"].values():
        assert programs[EXPORTED]["agreement"] == "all"


def test_a_peer_that_is_not_installed_is_named_with_the_way_out(result):
    found, shown = result
    assert list(found["missing"]) == ["onnxruntime-genai fp32"]
    assert "make_peers.py" in found["missing"]["onnxruntime-genai fp32"]
    assert "## Missing" in shown


def test_quality_memory_and_start(result):
    found, _ = result
    exact = found["quality"][EXPORTED]
    reference = found["quality"][REFERENCE]
    assert exact["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-4)
    assert exact["kl_mean"] < 1e-6
    assert exact["tokens_scored"] == 47
    one = found["programs"][EXPORTED]
    assert one["start"]["load_to_first_token_s"]["median"] > 0
    if one["memory"]:
        assert one["memory"]["decode_peak_bytes"] > 1e7


def test_the_report_says_what_it_rests_on(result):
    found, shown = result
    for fact in (found["machine"]["cpu"], "torch ", "least .. largest", "Other processes"):
        assert fact in shown
    broken = copy.deepcopy(found)
    for programs in broken["workloads"].values():
        programs[EXPORTED] |= {"speed": None, "problem": "out of order"}
    assert "out of order" in markdown(broken)


def test_tokens_that_differ_are_marked_where_they_must_not():
    expected, found = {0: [[1, 2, 3]], 5: [[1, 1, 1]]}, {0: [[1, 9, 3]], 1: [[7, 7, 7]]}
    assert agreement(expected, found, exact=True) == "DIFFER: 1 of 3"
    assert agreement(expected, found, exact=False) == "1 of 3"
    assert agreement(expected, expected, exact=True) == "all"
    assert agreement({}, found, exact=True) == "not compared"


def test_every_round_has_another_prompt():
    single, batch = Workload("", 10, 4), Workload("", 100, 4, batch=9)
    ids = list(range(3000))
    assert single.prompts(ids, 0) == [list(range(10))]
    assert single.prompts(ids, 1) == [list(range(10, 20))]
    assert [len(one) for one in batch.prompts(ids, 1)] == [100, 12, 76, 31, 50, 87, 23, 62, 100]
    first, second = ({one for row in batch.prompts(ids, number) for one in row} for number in (0, 1))
    assert not first & second
    with pytest.raises(InputError, match="longer --text"):
        single.prompts(ids[:25], 2)


def test_conversions_of_other_weights_have_another_place(tiny, tmp_path):
    first = model_key(tiny)
    copy = tmp_path / tiny.name
    copy.mkdir()
    for file in tiny.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_key(copy) == first
    (copy / "model.safetensors").write_bytes(b"shorter")
    assert model_key(copy) != first
    assert all(one.missing for one in peers(tmp_path, tiny) if "transformers" not in one.name)


def test_a_program_that_fails_is_told_from_the_others(tiny, tmp_path):
    good = our_candidate("good", tiny, "float32", backend="torch")
    with pytest.raises(WorkerError, match="UnknownPluginError"):
        Worker(replace(good, options={"backend": "no-such"}), {}, tmp_path / "log")
    ids = [3 + n % 90 for n in range(200)]
    with Worker(good, {"threads": 1}, tmp_path / "log") as one, Worker(good, {}, tmp_path / "log") as two:
        two.process.kill()
        found = measure({"one": one, "two": two}, Workload("", 8, 4), ids, Conditions(rounds=1, retries=0))
        assert one.settings["threads"] == 1
    assert found["one"].problem is None
    assert found["one"].laps[0].stamps_ns.shape == (1, 4)
    assert "ended" in found["two"].problem


def test_the_lock_is_held_and_given_up(tmp_path, monkeypatch):
    file, now, slept = tmp_path / "lock", [0.0], []
    monkeypatch.setattr("harness.measure.time.monotonic", lambda: now[0])
    monkeypatch.setattr("harness.measure.time.sleep", lambda seconds: slept.append(free()))

    def free() -> bool:
        with file.open("a") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    lock = Lock(file, most_s=10)
    lock.hold()
    assert not free()
    now[0] = 9.0
    lock.hold()
    assert not slept
    now[0] = 11.0
    lock.hold()
    assert slept == [True]  # others had their turn in between
    assert not free()
    lock.release()
    lock.release()
    assert free()
    Lock(None).hold()


def test_bytes_that_a_token_reads(tiny):
    # Its head is a matrix of its own, so a token reads one row of the embedding only.
    import torch
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    weights = sum(one.numel() for one in module.parameters()) - module.get_input_embeddings().weight.numel()
    assert bytes_a_token(tiny, "float32") == 4 * weights
    assert bytes_a_token(tiny, "bfloat16") == 2 * weights


def test_thread_counts_reach_from_one_to_all(monkeypatch):
    monkeypatch.setattr("generation.usable_cpus", lambda: 12)
    assert thread_counts() == [1, 2, 4, 8, 12]
    monkeypatch.setattr("generation.usable_cpus", lambda: 1)
    assert thread_counts() == [1]


def test_the_best_setting_of_a_sweep_is_taken():
    tried = [
        {"setting": {"threads": 1}, "decode": {"median": 5.0}, "prefill": {"median": 90.0}},
        {"setting": {"threads": 2}, "decode": {"median": 9.0}, "prefill": {"median": 80.0}},
        {"setting": {"threads": 4}, "problem": "out of order"},
    ]
    assert best_settings(tried) == {"decode": {"threads": 2}, "prefill": {"threads": 1}}
    assert best_settings(tried[2:]) == {}


def test_tables_are_aligned():
    shown = table(("name", "value"), [("a", "1"), ("long name", "22")])
    assert len({len(line) for line in shown.splitlines()}) == 1
    assert shown.splitlines()[1].endswith("-: |")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("batching.py", ["--batch", "3", "--new-tokens", "4"]),
        ("prompt_lookup.py", ["--new-tokens", "8", "--tokens", "4", "--passage", "20"]),
    ],
)
def test_the_small_benchmarks_run(benchmarks, tiny, text, tmp_path: Path, script, words):
    out = tmp_path / "out.json"
    more = ["--text", text] if script == "prompt_lookup.py" else []
    done = subprocess.run(
        [sys.executable, benchmarks / script, tiny, *words, *more, "--rounds", "1", "--json", out],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    if script == "batching.py":
        assert found["rows_that_differ"] == 0
        assert found["ratio"]["median"] > 0
    else:
        assert set(found["found"]) == {"quote and edit", "free text, greedy", "free text, sampled"}
