"""Limits, noise and simplicity: who is recommended."""

from dataclasses import replace

import pytest

from lmopt.errors import UnsupportedOptionError
from lmopt.evaluation import Figure
from lmopt.tuning.choosing import choose
from lmopt.tuning.limits import Constraints, check_objectives
from lmopt.tuning.trials import Trial

ALL = ("latency", "size", "quality")


def trial(
    name, ms, megabytes=100.0, ratio=1.0, *, spread=0.02, is_float=False, simplicity=(-4.0,), error=0.001
):
    return Trial(
        name=name, recipe=name, steps=(), stored=False, backend="onnxruntime", exporter="onnx", target="portable",
        options={}, threads=2, is_float=is_float, simplicity=simplicity, state="measured",
        token_p50_ms=Figure(ms, ms * (1 - spread), ms * (1 + spread)), token_p95_ms=Figure(ms, ms, ms),
        first_token_ms=Figure(ms, ms, ms), decode_tokens_per_s=Figure(1, 1, 1), peak_memory_bytes=10**8,
        artifact_bytes=int(megabytes * 1e6), starts=1,
        loss={"perplexity_ratio": ratio, "perplexity_ratio_stderr": error, "kl_mean": ratio - 1, "nonfinite": 0},
    )  # fmt: skip


FLOAT = trial("float", 20.0, 538, is_float=True, simplicity=(-32.0,))


def test_the_fastest_that_keeps_the_limits_wins() -> None:
    found = choose([FLOAT, trial("a", 8.0), trial("b", 6.0, ratio=1.2), trial("c", 12.0, 80)],
                   Constraints(perplexity_ratio=1.05), ALL)  # fmt: skip
    assert found.best.name == "a"
    assert [one.name for one in found.pareto] == ["a", "c", "float"] or [
        one.name for one in found.pareto
    ] == ["a", "c"]


def test_a_slower_compressed_model_is_out_even_where_it_is_smallest() -> None:
    found = choose([FLOAT, trial("small", 30.0, 50)], Constraints(perplexity_ratio=1.05), ("size",))
    assert found.best.name == "float"
    assert any("never recommended: small" in one for one in found.reasons)


def test_a_slower_one_is_in_where_no_float_model_would_do() -> None:
    limits = Constraints(perplexity_ratio=1.05, artifact_bytes=100_000_000)
    assert choose([FLOAT, trial("small", 30.0, 50)], limits, ALL).best.name == "small"


def test_within_the_noise_the_simpler_wins() -> None:
    simple = trial("simple", 8.1, simplicity=(-8.0,))
    found = choose([trial("fancy", 8.0, simplicity=(-4.0,)), simple], Constraints(perplexity_ratio=1.05), ALL)
    assert found.best is simple
    assert [one.name for one in found.equals] == ["fancy"]


def test_beyond_the_noise_the_faster_wins() -> None:
    found = choose([trial("fancy", 8.0), trial("simple", 8.6, simplicity=(-8.0,))],
                   Constraints(perplexity_ratio=1.05), ALL)  # fmt: skip
    assert found.best.name == "fancy"


def test_a_noisy_machine_makes_more_equal() -> None:
    noisy = [trial("fancy", 8.0, spread=0.2), trial("simple", 8.6, simplicity=(-8.0,))]
    assert choose(noisy, Constraints(perplexity_ratio=1.05), ALL).best.name == "simple"


def test_of_equally_fast_ones_the_smaller_wins_by_the_second_objective() -> None:
    two = [trial("large", 8.0, 200, simplicity=(-8.0,)), trial("small", 8.1, 100)]
    assert choose(two, Constraints(perplexity_ratio=1.05), ALL).best.name == "small"
    assert choose(two, Constraints(perplexity_ratio=1.05), ("latency",)).best.name == "large"


def test_the_order_of_trials_does_not_matter() -> None:
    some = [FLOAT, trial("a", 8.0), trial("b", 8.1, 90), trial("c", 7.9, 120, 1.01), trial("d", 6.0, 80, 1.1)]
    limits = Constraints(perplexity_ratio=1.05)
    assert choose(some, limits, ALL).best == choose(some[::-1], limits, ALL).best


def test_logits_that_are_not_finite_are_out() -> None:
    broken = trial("broken", 1.0)
    broken = replace(broken, loss={**broken.loss, "nonfinite": 3})
    assert choose([FLOAT, broken], Constraints(perplexity_ratio=1.05), ALL).best is FLOAT


def test_where_none_keeps_the_limits_the_nearest_is_named() -> None:
    found = choose([FLOAT, trial("a", 8.0)], Constraints(perplexity_ratio=1.05, token_p50_ms=5.0), ALL)
    assert found.best is None
    assert "nearest is a" in found.reasons[1]
    assert "8 ms > 5 ms" in found.reasons[1]


@pytest.mark.parametrize(
    "given", [{"latency": 3}, {"perplexity_ratio": 0.9}, {"token_p50_ms": -1}, {"artifact_bytes": True},
              {"kl_mean": float("nan")}]
)  # fmt: skip
def test_impossible_limits_are_refused(given) -> None:
    with pytest.raises(UnsupportedOptionError):
        Constraints.of(given)


def test_quality_is_limited_where_nobody_limits_it() -> None:
    assert Constraints.of({"token_p50_ms": 5}).perplexity_ratio == 1.05
    assert Constraints.of({"kl_mean": 0.1}).perplexity_ratio is None


@pytest.mark.parametrize("given", [(), ("speed",), ("size", "size")])
def test_unknown_objectives_are_refused(given) -> None:
    with pytest.raises(UnsupportedOptionError, match="latency"):
        check_objectives(given)


def test_excesses_are_above_zero_where_a_limit_is_passed() -> None:
    limits = Constraints(perplexity_ratio=1.05, artifact_bytes=100)
    found = limits.excesses({"perplexity_ratio": 1.04, "artifact_bytes": 200, "token_p50_ms": 3})
    assert found["perplexity_ratio"] < 0 < found["artifact_bytes"]
    assert limits.broken({"artifact_bytes": 200}) == ["size of the files 0.0 MB > 0.0 MB"]
