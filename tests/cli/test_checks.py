"""`export`, `compare`, `bench`, `backends`, `demo`: figures, and a failed check in the exit status."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lmopt.artifact import Artifact
from lmopt.cli import demo, plot, trial
from lmopt.errors import ParityError
from lmopt.evaluation import TOLERANCES, Perplexity, measure_speed
from lmopt.exporter import Exporter
from lmopt.registry import backends
from lmopt.spec import BackendSpec, Capabilities, Requirement

PNG = b"\x89PNG\r\n\x1a\n"


def test_export_shows_the_report_and_publishes(call, tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("export", tiny, out, "--opset", 21)
    assert result.status == 0, result.stderr
    assert "Parity of onnxruntime" in result.stdout
    assert "batch-left" in result.stdout
    assert "peak memory" in result.stdout
    assert Artifact.open(out).formats == ("onnx",)
    again = call("export", tiny, out)
    assert again.status == 2
    assert "ArtifactExistsError" in again.stderr
    replaced = call("export", tiny, out, "--overwrite", "--json")
    assert replaced.status == 0
    assert replaced.data["parity"]["onnx"]["ok"] is True
    assert replaced.data["bytes"] == sum(one.stat().st_size for one in out.rglob("*") if one.is_file())


def test_a_failed_gate_is_status_1_with_its_numbers(call, tiny, tmp_path: Path, monkeypatch) -> None:
    # No export is exact to the last bit: with these limits every one fails.
    strict = replace(TOLERANCES["float32"], kl_mean=1e-30, atol=1e-30, rtol=0.0)
    plain = Exporter.__init__

    def init(self, *formats, **options):
        plain(self, *formats, **{**options, "tolerance": strict})

    monkeypatch.setattr(Exporter, "__init__", init)
    result = call("export", tiny, tmp_path / "out", "--json")
    assert result.status == 1
    assert result.data["ok"] is False
    assert result.data["error"]["type"] == ParityError.__name__
    assert result.data["parity"]["ok"] is False
    assert not (tmp_path / "out").exists()


def test_compare_of_equals(call, tiny, exported) -> None:
    result = call("compare", tiny, exported, "--backend-b", "onnxruntime", "--bisect", "--json")
    assert result.status == 0, result.stderr
    assert result.data["parity"]["ok"] is True
    assert result.data["bisect"]["block"] is None


def test_compare_finds_the_weight_that_was_scaled(call, tiny, damaged) -> None:
    result = call("compare", tiny, damaged, "--bisect", "--json")
    assert result.status == 1
    assert result.data["ok"] is False
    assert result.data["bisect"]["block"] == "model.layers.1"
    assert "model.layers.1.mlp.up_proj" in result.data["bisect"]["suspects"]


def test_compare_takes_a_text_and_a_tolerance(call, tiny, damaged, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w5 w6 w7\n\nw8 w9\n\n\n")
    shown = call("compare", tiny, damaged, "--text", text, "--bisect")
    assert shown.status == 1
    assert "FAILED" in shown.stdout
    assert "operator model.layers.1.mlp.up_proj" in shown.stdout
    assert call("compare", tiny, damaged, "--text", text, "--tolerance", "int4").status == 0
    text.write_text("\n\n")
    assert call("compare", tiny, damaged, "--text", text).status == 2


def test_bench(call, exported) -> None:
    words = ("--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 2)
    result = call("bench", exported, "--backend", "onnxruntime", *words, "--json")
    assert result.status == 0, result.stderr
    found = result.data["engines"]["onnxruntime"]
    assert found["speed"]["rounds"] == 2
    assert found["decode_ratio"] == 1.0
    assert found["memory"]["peak_bytes"] > 1e7
    assert result.data["machine"]["usable_cpus"] >= 1
    shown = call("bench", exported, "--backend", "onnxruntime", "--no-memory", *words)
    assert "decode, tokens/s" in shown.stdout
    assert "cores" in shown.stdout
    too_long = call("bench", exported, "--prompt-tokens", 500)
    assert too_long.status == 2
    assert "ContextLengthError" in too_long.stderr


def test_bench_takes_every_ready_engine(call, tiny) -> None:
    words = ("--prompt-tokens", 8, "--new-tokens", 4, "--rounds", 1, "--no-memory")
    result = call("bench", tiny, *words, "--json")
    assert result.status == 0, result.stderr
    names = list(result.data["engines"])
    assert names[:1] == ["torch"]
    assert "onnxruntime" in names


@pytest.fixture
def absent() -> BackendSpec:
    """A backend whose module nobody has."""
    needs = Requirement("lmopt_no_such_module", "lmopt[no-such-extra]")
    spec = BackendSpec("absent", "nowhere:engine", Capabilities(("onnx",)), (needs,))
    backends.register(spec)
    yield spec
    backends.unregister("absent")


def test_backends(call, absent) -> None:
    result = call("backends", "--json")
    states = {one["name"]: one["state"] for one in result.data["backends"]}
    assert states["torch"] == states["onnxruntime"] == "ready"
    assert states["absent"] == "missing"
    assert {"onnx", "safetensors", "torch.export"} <= {one["name"] for one in result.data["exporters"]}
    shown = call("backends").stdout
    assert f'{sys.executable} -m pip install "lmopt[no-such-extra]"' in shown


@pytest.fixture
def quick_demo(monkeypatch) -> None:
    """Measure on little text."""
    monkeypatch.setattr(trial, "_TEXT_TOKENS", 64)
    monkeypatch.setattr(trial, "_ROUNDS", 1)
    monkeypatch.setattr(demo, "sample_text", lambda: "w3 w4 w5 " * 40)


def test_demo(call, tiny, tmp_path: Path, quick_demo) -> None:
    out = tmp_path / "here" / "my-demo"
    out.parent.mkdir()
    result = call("demo", tiny, "--out", out, "--new-tokens", 8, "--prompt", "w5 w6", "--json")
    assert result.status == 0, result.stderr
    engines = result.data["engines"]
    assert {"torch", "onnxruntime"} <= set(engines)
    assert len({tuple(one["token_ids"]) for one in engines.values()}) == 1
    for one in engines.values():
        assert one["memory"]["peak_bytes"] > 1e7
    reference, candidate = engines["torch"]["perplexity"], engines["onnxruntime"]["perplexity"]
    assert candidate["value"] == pytest.approx(reference["value"], rel=5e-4)
    # Nothing but the artefact is in its folder, and nothing but the plot beside it.
    Artifact.open(out)
    assert sorted(one.name for one in out.parent.iterdir()) == ["my-demo", "my-demo.png"]
    assert (out.parent / "my-demo.png").read_bytes().startswith(PNG)


def test_demo_fails_where_an_engine_says_something_else(
    call, tiny, tmp_path: Path, quick_demo, monkeypatch
) -> None:
    monkeypatch.setattr(demo, "can_plot", lambda: False)
    monkeypatch.setattr(trial, "footprint", lambda *_, **__: {"problem": "not measured here"})
    plain = trial.Trial

    def lying(name, token_ids, *rest, **more):
        return plain(name, token_ids[:2] + [0] * 6 if name == "onnxruntime" else token_ids, *rest, **more)

    monkeypatch.setattr(trial, "Trial", lying)
    result = call("demo", tiny, "--out", tmp_path / "demo", "--new-tokens", 8)
    assert result.status == 1
    assert "The engines do not agree" in result.stdout
    assert "differs from torch at new token 3" in result.stdout
    assert "matplotlib is not installed" in result.stdout
    assert 'pip install "lmopt[plot]"' in result.stdout


def test_demo_leaves_slow_engines_untimed(call, tiny, tmp_path: Path, quick_demo, monkeypatch) -> None:
    monkeypatch.setattr(demo, "can_plot", lambda: False)
    monkeypatch.setattr(trial, "footprint", lambda *_, **__: {})
    monkeypatch.setattr(trial, "_PATIENCE_S", 0.0)
    result = call("demo", tiny, "--out", tmp_path / "demo", "--new-tokens", 4, "--json")
    assert result.status == 0, result.stderr
    engines = result.data["engines"]
    assert engines["torch"]["speed"] is not None
    assert engines["onnxruntime"]["speed"] is None
    assert "they would take about" in engines["onnxruntime"]["notes"][0]


@pytest.mark.parametrize(
    ("seconds", "calls", "measure"),
    [
        ([70.0, 50.0], 2, 50.0),  # its kernels were made in the first call
        ([50.0], 1, 50.0),
        ([70.0, 90.0], 2, 70.0),
    ],
)
def test_demo_does_not_take_a_first_call_for_an_engines_speed(monkeypatch, seconds, calls, measure) -> None:
    asked = []

    def probe(runtime, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
        asked.append((runtime, prompt_tokens, new_tokens))
        return {"token": 0.1, "measure": seconds[len(asked) - 1]}

    monkeypatch.setattr(trial, "_probe", probe)
    assert trial._estimate("runtime", 128, 32)["measure"] == measure
    assert asked == [("runtime", 128, 32)] * calls


def test_demo_replaces_its_own_artefact_only(call, tiny, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("years of work")
    result = call("demo", tiny, "--out", tmp_path / "demo")
    assert result.status == 2
    assert "ArtifactExistsError" in result.stderr
    assert (tmp_path / "demo" / "thesis.tex").read_text() == "years of work"


def test_the_sample_text_is_long_enough() -> None:
    assert len(trial.sample_text()) > 100_000


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plot_of_one_engine_without_perplexity(tmp_path: Path, tiny) -> None:
    from lmopt.runtime import Runtime

    with Runtime(tiny) as runtime:
        speed = measure_speed(runtime.engine, prompt_tokens=4, new_tokens=2, rounds=1)
    plot.plot(tmp_path / "one.png", "One engine", {"torch": speed}, {})
    plot.plot(tmp_path / "two.png", "Quality", {}, {"torch": Perplexity(9.0, 2.2, 0.1, 10, 10, 8, 8)})
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("one.png", "two.png"))
