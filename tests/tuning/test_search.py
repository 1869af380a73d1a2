"""The search on a made-up machine: what is tried, recorded, chosen, resumed."""

import json
from pathlib import Path

import pytest

from lmopt.artifact import Artifact
from lmopt.errors import EngineError, JobMismatchError, LockTimeoutError
from lmopt.tuning.work import WorkError


def test_it_finds_the_best_and_publishes_it(whole) -> None:
    result, machine = whole
    assert result.best is not None
    assert result.best.recipe.startswith("rtn 4-bit g32 asymmetric")
    assert result.best.options == {"accuracy_level": 4}
    artifact = Artifact.open(result.artifact)
    assert artifact.manifest["recipe"]["steps"][0]["bits"] == 4
    assert artifact.manifest["measurements"]["tune"]["run_with"] == {"backend": "onnxruntime", "threads": 2}
    assert machine.now <= 700 + 60  # beyond the budget there is only the choice's own second measurement
    assert result.deviation == pytest.approx(0, abs=0.01)
    assert any("the prediction holds" in one for one in result.reasons)


def test_the_float_model_is_measured_on_every_route(whole) -> None:
    floats = [one for one in whole[0].trials if one.is_float and one.threads == 2]
    assert {(one.backend, one.target, one.state) for one in floats} == {
        ("torch", None, "measured"), ("onnxruntime", "portable", "measured"),
        ("onnxruntime", "onnxruntime", "measured"),
    }  # fmt: skip


def test_a_failure_is_a_trial_with_its_reason_and_the_search_goes_on(whole) -> None:
    result, machine = whole
    broken = {one.recipe: (one.state, one.kind) for one in result.trials if one.recipe.startswith("my ")}
    assert broken == {"my float16": ("failed", "memory"), "my seven bits": ("failed", "crash")}
    tried = [json.dumps(a["steps"]) for name, a in machine.calls if name == "compress"]
    casts = [one for one in tried if "cast" in one]
    assert (
        len(casts) <= 4
    )  # twice by the user's recipes, twice by those of every search; never again for a route
    page = (result.folder / "report.html").read_text()
    assert "it broke: &lt;memory&gt;" in page
    assert "it broke: <" not in page


def test_work_is_shared(whole) -> None:
    calls = whole[1].calls
    targets = [arguments["target"] for name, arguments in calls if name == "export"]
    assert len(targets) == len(set(targets))
    scored = [(a["place"], a["backend"]) for name, a in calls if name == "measure" and a["folder"]]
    assert len(scored) == len(set(scored))


def test_a_recipe_that_loses_too_much_is_never_exported(whole) -> None:
    result, machine = whole
    aside = [one for one in result.trials if "g64 symmetric" in one.recipe and one.recipe.startswith("rtn 4")]
    assert aside
    assert {one.state for one in aside} == {"screened"}
    steps = [machine._made.get(a["source"], ([], {}))[0] for name, a in machine.calls if name == "export"]
    assert not any(one and one[0].get("group_size") == 64 and one[0]["bits"] == 4 for one in steps)


def test_what_takes_longer_than_a_piece_of_work_may_fails_by_time(search, made_up) -> None:
    result = search(trial_seconds=39.0)  # an export takes 40
    routes = {one.target: (one.state, one.kind) for one in result.trials if one.is_float}
    assert routes == {
        None: ("measured", ""),
        "portable": ("failed", "time"),
        "onnxruntime": ("failed", "time"),
    }
    assert result.best.backend == "torch"


def test_a_slower_compressed_model_is_never_recommended(search, made_up) -> None:
    made_up.ms = lambda arguments, usual: 30.0 if arguments["steps"] else usual
    result = search(objectives=["size"])
    assert result.best.is_float
    assert any("never recommended" in one for one in result.reasons)


def test_calibration_is_only_tried_where_rounding_says_that_it_can_help(search, made_up) -> None:
    result = search(budget=2000.0, backends=["onnxruntime"])
    done = {a["steps"][0]["group_size"] for name, a in made_up.calls
            if name == "compress" and a["steps"][0]["step"] == "gptq"}  # fmt: skip
    assert done <= {32}  # ratios of 1.3 and more by rounding are beyond what calibration wins back
    told = [one.reason for one in result.trials if one.recipe.startswith("gptq 4-bit g64")]
    assert told
    assert all("would not do" in one for one in told)


def test_limits_on_size_are_held_against_an_estimate_first(search, made_up) -> None:
    result = search(constraints={"artifact_bytes": 40_000}, budget=800.0)
    halves = [one for one in result.trials if one.recipe in ("bfloat16", "float16")]
    assert all(one.state == "screened" and "estimated" in one.reason for one in halves)
    assert result.best.artifact_bytes <= 40_000
    casts = [a for name, a in made_up.calls if name == "compress" and a["steps"][0]["step"] == "cast"]
    assert not casts


def test_nothing_is_published_where_no_deployment_keeps_the_limits(search) -> None:
    result = search(constraints={"token_p50_ms": 0.01})
    assert result.best is None
    assert result.artifact is None
    assert not (result.folder / "model").exists()
    assert "No deployment keeps every limit" in str(result.reasons)


def test_equal_within_the_noise_the_simpler_wins(search, made_up) -> None:
    made_up.ms = lambda arguments, usual: 20.0 if arguments["backend"] == "onnxruntime" else 60.0
    result = search(objectives=["latency"], only_recipes=True, recipes={"eight": _eight()})
    assert result.best.is_float
    assert any("cannot be told from it" in one for one in result.reasons)


def test_an_interrupted_search_goes_on(search, made_up) -> None:
    def interrupt(name, arguments):
        if len(made_up.calls) == 9:
            raise KeyboardInterrupt

    made_up.rules.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        search()
    before = list(made_up.calls)
    made_up.rules.clear()
    made_up.calls.clear()
    result = search()
    assert result.best is not None
    done = [
        (name, a.get("target") or a.get("place")) for name, a in before[:-1] if name in ("prepare", "export")
    ]
    again = [(name, a.get("target") or a.get("place")) for name, a in made_up.calls]
    assert not set(done) & set(again)
    measured = [one.name for one in result.trials]
    assert len(measured) == len(set(measured))


def test_more_budget_goes_on_where_an_earlier_one_ended(search, made_up) -> None:
    first = search(budget=200.0)
    assert any(one.state == "postponed" for one in first.trials)
    assert not first.finished
    second = search(budget=400.0)
    openings = [one for one in first.trials if one.state == "postponed" and "8-bit g32 symmetric" in one.name]
    assert openings  # what is worth knowing of any model comes first
    now = {one.name: one.state for one in second.trials}
    assert all(now[one.name] == "measured" for one in openings)
    assert len(second.trials) > len(first.trials)


def test_another_search_in_the_same_folder_is_refused(search) -> None:
    search(budget=100.0)
    with pytest.raises(JobMismatchError, match="constraints"):
        search(constraints={"perplexity_ratio": 1.2})


def test_two_searches_at_once_in_one_folder_are_refused(search, made_up, tmp_path: Path) -> None:
    def second(name, arguments):
        made_up.rules.clear()
        with pytest.raises(LockTimeoutError, match="another process"):
            search()

    made_up.rules.append(second)
    search(budget=60.0)


def test_a_model_that_cannot_be_read_is_an_error(search, made_up) -> None:
    def fail(name, arguments):
        if name == "prepare":
            raise WorkError("error", "CorruptArtifactError: bad file")

    made_up.rules.append(fail)
    with pytest.raises(EngineError, match="bad file"):
        search()


def test_recipes_of_the_user_come_first(search, made_up) -> None:
    result = search(recipes={"mine": _eight()}, budget=400.0)
    first = next(a for name, a in made_up.calls if name == "compress")
    assert first["steps"] == [_eight().to_dict()]
    assert any(one.recipe == "mine" and one.state == "measured" for one in result.trials)


def test_the_luck_of_one_start_does_not_decide(search, made_up) -> None:
    seen: list[int] = []

    def lucky(arguments, usual):
        steps = arguments["steps"]
        if steps and steps[0].get("head") == 4 and arguments["threads"] == 2:
            seen.append(1)
            return usual * (0.8 if len(seen) == 1 else 1.5)
        return usual

    made_up.ms = lucky
    result = search()
    chosen = result.best
    assert chosen.starts == result.workload.starts
    assert result.deviation == pytest.approx(0, abs=0.05)


def _eight():
    from lmopt.compression import Quantize

    return Quantize(bits=8, group_size=32)
