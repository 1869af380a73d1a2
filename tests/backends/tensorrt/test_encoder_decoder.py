"""Both graphs of an encoder-decoder through the real RTX compiler; nothing runs them there yet."""

from pathlib import Path

import pytest

import lmopt
from lmopt.backends.tensorrt.ahead import build_folder
from lmopt.backends.tensorrt.building import BuildOptions, build_plan
from lmopt.backends.tensorrt.engine_cache import graph_names, graph_of
from lmopt.errors import UnsupportedOptionError, UnsupportedPrecisionError
from lmopt.testing.seq2seq import tiny_bart, tiny_t5, tiny_whisper

TOGETHER = ("8.6", "8.9", "12.0")
FAMILIES = {"bart": tiny_bart, "whisper": tiny_whisper, "t5": tiny_t5}


@pytest.fixture(scope="session")
def pair(keep):
    """Export a family in a float type, once."""

    def one(family: str, dtype: str = "float32"):
        module = FAMILIES[family]()
        model = lmopt.Model.from_module(module if dtype == "float32" else module.half())
        return keep(model.module, "onnx", model.facts, Path(f"pair-{family}-{dtype}"))

    return one


# BART in float16 looks at its values while it computes, which torch cannot trace.
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param("bart", "float32", marks=pytest.mark.sweep),
        ("whisper", "float32"),
        pytest.param("t5", "float32", marks=pytest.mark.sweep),
        pytest.param("whisper", "float16", marks=pytest.mark.sweep),
        ("t5", "float16"),
    ],
)
def test_both_graphs_compile_for_three_generations(pair, family, dtype):
    artifact = pair(family, dtype)
    encoder, decoder = (
        build_plan(
            graph_of(artifact, file),
            BuildOptions("tensorrt_rtx", TOGETHER, max_source=48),
            facts=artifact.facts,
        )
        for file in graph_names(artifact)
    )
    assert [one.name for one in encoder.profiles] == ["encode"]
    assert [one.name for one in decoder.profiles] == ["prefill", "decode"]
    assert encoder.targets == decoder.targets == TOGETHER
    # What one gives of a source is what the other takes.
    given = {one.name.replace("present", "past_key_values"): one for one in encoder.outputs}
    taken = {one.name: one for one in decoder.inputs if ".encoder." in one.name}
    assert given.keys() == taken.keys()
    for name, one in taken.items():
        assert (one.dtype, one.shape) == (dtype, given[name].shape)
        least, _, most = decoder.profiles[1].shapes(one)
        if artifact.facts.source.fixed:
            assert least[2] == most[2] == artifact.facts.source.length // 2
        else:
            assert (least[2], most[2]) == (1, 48)
    assert encoder.compute_type == decoder.compute_type == dtype


def test_lmopt_build_makes_both(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("LMOPT_CACHE", str(tmp_path / "cache"))
    folder = pair("bart").path
    rows = build_folder(folder, {"flavour": "tensorrt_rtx"}, targets=["8.9"])
    assert [row["graph"] for row in rows] == ["encoder_model.onnx", "decoder_model.onnx"]
    assert not any(row["from_cache"] for row in rows)
    again = build_folder(folder, {"flavour": "tensorrt_rtx"}, targets=["8.9"])
    assert all(row["from_cache"] for row in again)
    with pytest.raises(UnsupportedOptionError, match="2 of them"):
        build_folder(folder, {"flavour": "tensorrt_rtx"}, targets=["8.9"], output=tmp_path / "plan")
    with pytest.raises(UnsupportedPrecisionError, match=r"7\.5 does not compute in float32"):
        build_folder(folder, {"flavour": "tensorrt_rtx"}, targets=["7.5"], check=True)
    checked = build_folder(folder, {"flavour": "tensorrt_rtx"}, targets=["8.6", "12.0"], check=True)
    assert [(row["graph"], row["targets"]) for row in checked] == [
        (name, [target]) for name in graph_names(pair("bart")) for target in ("8.6", "12.0")
    ]
