"""`lmopt compress`."""

import json
from pathlib import Path

import pytest

from lmopt import Model
from lmopt.artifact import Artifact
from lmopt.compression import GPTQ


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text of the tiny model's words."""
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"w{(7 * n * n + n) % 97}" for n in range(2000)))
    return path


def test_a_step_by_name_with_fields(call, tiny: str, tmp_path: Path) -> None:
    result = call(
        "compress",
        tiny,
        tmp_path / "out",
        "--recipe",
        "rtn",
        "--set",
        "bits=8",
        "--set",
        "group_size=16",
        "--json",
    )
    assert result.status == 0, result.stderr
    said = result.data
    assert said["recipe"][0] | {"bits": 8, "group_size": 16, "step": "rtn"} == said["recipe"][0]
    assert 0 < said["loss"]["difference"]["kl_mean"] < 0.01
    assert said["loss"]["bytes"] < said["loss"]["float_bytes"]
    manifest = Artifact.open(tmp_path / "out").manifest
    assert manifest["recipe"]["steps"] == said["recipe"]
    assert Model.from_pretrained(tmp_path / "out").recipe == tuple(said["recipe"])


def test_a_recipe_file_with_calibration_and_speed(call, tiny: str, tmp_path: Path, book: Path) -> None:
    recipe = {"lmopt_recipe": 1, "steps": [{"step": "gptq", "bits": 4, "group_size": 16}]}
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    result = call(
        "compress", tiny, tmp_path / "out", "--recipe", tmp_path / "r.json", "--calibration", book, "--rows", "8",
        "--row-tokens", "32", "--text", book, "--tokens", "200", "--speed", "torch",
    )  # fmt: skip
    assert result.status == 0, result.stderr
    for word in ("perplexity", "KL mean", "worst layers", "decode tokens/s", "smaller", "peak memory"):
        assert word in result.stdout
    # The artefact's own manifest is a recipe to do the same again.
    again = call(
        "compress", tiny, tmp_path / "again", "--recipe", tmp_path / "out" / "lmopt.json", "--calibration", book,
        "--rows", "8", "--row-tokens", "32",
    )  # fmt: skip
    assert again.status == 0, again.stderr
    one, other = (Model.from_pretrained(tmp_path / name).fingerprint() for name in ("out", "again"))
    assert one == other


def test_a_loss_over_the_limit_writes_nothing(call, tiny: str, tmp_path: Path) -> None:
    result = call(
        "compress", tiny, tmp_path / "out", "--recipe", "rtn", "--set", "bits=2", "--max-kl", "1e-9", "--json"
    )
    assert result.status == 1
    assert result.data["error"]["type"] == "ParityError"
    assert result.data["parity"]["difference"]["kl_mean"] > 1e-9
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(
    call, tiny: str, tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "compress", tiny, tmp_path / "new" / "out", "--recipe", "gptq", "--set", "group_size=16",
        "--calibration", book, "--rows", "8", "--row-tokens", "32",
    )  # fmt: skip
    apply, seen = GPTQ.apply, []

    def interrupted(self, weight, form, name, statistics=None):
        seen.append(name)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return apply(self, weight, form, name, statistics)

    with monkeypatch.context() as patch:
        patch.setattr(GPTQ, "apply", interrupted)
        assert call(*words).status == 130
    assert len(seen) == 6
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "new" / "out").exists()
    assert call(*words).status == 0
    assert Model.from_pretrained(tmp_path / "new" / "out").recipe[0]["step"] == "gptq"


def test_a_loss_that_is_unusual_is_a_warning(call, tiny: str, tmp_path: Path) -> None:
    options = ("--set", "bits=2", "--set", "embedding=2", "--set", "head=2")
    result = call("compress", tiny, tmp_path / "out", "--recipe", "rtn", *options)
    assert result.status == 0
    assert "loses too much" in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--recipe", "gptq"], "--calibration"),
        (["--recipe", "gptg"], "gptq"),
        (["--recipe", "rtn", "--set", "bit=4"], "bits"),
        (["--recipe", "rtn", "--tolerance", "int5"], "int4"),
    ],
)
def test_what_cannot_be_is_told(call, tiny: str, tmp_path: Path, options: list[str], told: str) -> None:
    result = call("compress", tiny, tmp_path / "out", *options)
    assert result.status == 2
    assert told in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_steps_are_listed(call) -> None:
    result = call("backends", "--json")
    names = {one["name"] for one in result.data["compressors"]}
    assert {"rtn", "gptq", "awq", "sparsegpt", "prune_channels", "drop_blocks"} <= names


def test_the_format_of_others_is_an_option(call, tiny: str, tmp_path: Path) -> None:
    words = (
        "compress",
        tiny,
        tmp_path / "out",
        "--recipe",
        "rtn",
        "--set",
        "bits=8",
        "--set",
        "group_size=16",
    )
    refused = call(*words, "--quantization-format", "compressed-tensors")
    assert refused.status != 0
    assert "dequantize" in refused.stderr
    assert not (tmp_path / "out").exists()
    result = call(*words, "--format", "compressed-tensors", "--dequantize")
    assert result.status == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    unknown = call(*words, "--overwrite", "--format", "fancy")
    assert unknown.status != 0
    assert "compressed-tensors" in unknown.stderr
