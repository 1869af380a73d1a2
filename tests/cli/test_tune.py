"""`lmopt tune` and `lmopt recommend`: options reach the search; statuses and words come back."""

from pathlib import Path

import pytest

from lmopt import tuning
from lmopt.errors import JobMismatchError
from lmopt.tuning import Constraints


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the verb asks the search for, which ends at once."""
    seen: dict = {}

    def search(source, **options):
        seen.update(options, source=source)
        raise JobMismatchError("stop here")

    monkeypatch.setattr(tuning, "tune", search)
    return seen


def test_options_reach_the_search(call, asked, tiny: str, tmp_path: Path) -> None:
    result = call(
        "tune", tiny, "--output", tmp_path / "out", "--max-perplexity-ratio", "1.02", "--max-size", "1.5 MB",
        "--max-memory", "2GiB", "--max-token-ms", "3", "--budget", "60", "--objective", "size",
        "--objective", "latency",
        "--backend", "torch", "--threads", "1", "--new-tokens", "8", "--trial-memory", "300MB",
    )  # fmt: skip
    assert result.status == 2
    assert "stop here" in result.stderr
    limits = Constraints.of(asked["constraints"])
    assert limits.given() == {
        "token_p50_ms": 3.0, "peak_memory_bytes": 2 * 2**30, "artifact_bytes": 1_500_000, "perplexity_ratio": 1.02,
    }  # fmt: skip
    assert asked["objectives"] == ("size", "latency")
    assert (asked["budget"], asked["backends"], asked["threads"]) == (60.0, ["torch"], [1])
    assert asked["workload"].new_tokens == 8
    assert asked["memory_bytes"] == 300_000_000
    assert "no --text" in result.stderr


@pytest.mark.parametrize("words", [("--max-size", "big"), ("--max-memory", "3XB"), ("--budget", "0")])
def test_impossible_options_are_refused(call, asked, tiny: str, words) -> None:
    assert call("tune", tiny, *words).status == 2
    assert not asked


def test_recommend_says_what_to_try_and_why(call, tiny: str) -> None:
    result = call("recommend", tiny)
    assert result.status == 0, result.stderr
    assert "float32" in result.stdout
    assert "docs/results/" in result.stdout
    plain = call("recommend", tiny, "--context", "64", "--json").data
    assert plain["ok"]
    assert plain["context"] == 64
    assert plain["needs"][0]["precision"] == "float32"
    assert all(why["source"] for one in plain["suggestions"] for why in one["reasons"])


def test_recommend_of_nothing_is_an_error(call, tmp_path: Path) -> None:
    result = call("recommend", tmp_path / "nothing")
    assert result.status == 2
    assert "neither a folder nor a file" in result.stderr
