"""`lmopt build`: the verb, through the command line, with the real RTX compiler."""

import json

import pytest

from lmopt.testing import models
from lmopt.testing.workshop import export
from lmopt.types import ModelFacts

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
testing = pytest.importorskip("typer.testing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("build") / "lstm"
    export(models.tiny_lstm(), "onnx", ModelFacts(vocab_size=models.VOCAB_SIZE), target)
    return target


@pytest.fixture
def lmopt(tmp_path, monkeypatch):
    from lmopt.cli.app import app

    monkeypatch.setenv("LMOPT_CACHE", str(tmp_path / "cache"))

    def run(*words, status=0):
        done = testing.CliRunner().invoke(app, ["build", *map(str, words)])
        assert done.exit_code == status, done.output
        return done

    return run


def test_engines_are_built_one_a_target_and_found_again(folder, lmopt):
    words = (
        folder,
        "--flavour",
        "tensorrt_rtx",
        "--compute-capability",
        "8.6",
        "--compute-capability",
        "12.0",
        "--json",
    )
    first = json.loads(lmopt(*words).stdout)["engines"]
    assert [one["targets"] for one in first] == [["8.6"], ["12.0"]]
    assert not any(one["from_cache"] for one in first)
    assert all(one["bytes"] > 10_000 and one["types"]["float32"] > 0 for one in first)
    again = json.loads(lmopt(*words).stdout)["engines"]
    assert all(one["from_cache"] for one in again)


def test_a_check_compiles_nothing_and_says_what_would_fail(folder, lmopt, tmp_path):
    done = lmopt(folder, "--check", "--compute-capability", "8.9")
    assert "Nothing was compiled" in done.stdout
    assert not (tmp_path / "cache").exists()
    refused = lmopt(folder, "--check", "--compute-capability", "7.5", status=2)
    assert "UnsupportedPrecisionError: compute capability 7.5 does not compute in float32" in refused.stderr


def test_an_engine_can_be_copied_out(folder, lmopt, tmp_path):
    lmopt(folder, "--compute-capability", "8.9", "--output", tmp_path / "lstm.plan")
    assert (tmp_path / "lstm.plan").stat().st_size > 10_000
    assert json.loads((tmp_path / "lstm.plan.json").read_text())["plan"]["targets"] == ["8.9"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--backend", "onnxruntime"), "compiles nothing ahead of time"),
        (("--option", "precision=fp16"), "no build option 'precision'"),
        (("--option", "max_batch=0"), "max_batch is 0"),
        (("--compute-capability", "9.0"), "does not build for compute capability 9.0"),
        (("--check", "--output", "x.plan"), "a check only"),
    ],
)
def test_what_cannot_be_done_is_said(words, said, folder, lmopt):
    assert said in lmopt(folder, *words, status=2).stderr
