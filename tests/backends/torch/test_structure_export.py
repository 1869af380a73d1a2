"""Cut models as graphs: smaller files, and the gate holds them to their eager selves, in both dialects."""

import math
from pathlib import Path
from typing import Any

import pytest
from structured_models import family, setting

import lmopt
from lmopt.backends.torch.blocks import drop_blocks
from lmopt.backends.torch.structure import prune_channels, prune_heads
from lmopt.compression.channels import PruneChannels
from lmopt.compression.depth import DropBlocks
from lmopt.compression.heads import PruneHeads

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")

_STEPS: dict[str, tuple[Any, Any]] = {
    "channels": (prune_channels, PruneChannels(0.25)),
    "unequal": (prune_channels, PruneChannels(0.25, uniform=False, multiple=4)),
    "heads": (prune_heads, PruneHeads(keep=1)),
    "blocks": (drop_blocks, DropBlocks(count=2)),
}


@pytest.mark.parametrize(
    ("name", "steps", "target"),
    [
        ("qwen3", ("unequal", "heads"), "onnxruntime"),
        ("qwen3", ("unequal", "heads"), "portable"),
        ("phi3", ("channels", "heads", "blocks"), "onnxruntime"),
        ("gpt2", ("unequal", "blocks"), "onnxruntime"),
        ("tiny-gpt", ("channels",), "portable"),
    ],
)
def test_a_graph_computes_what_eager_does(
    name: str, steps: tuple[str, ...], target: str, tmp_path: Path
) -> None:
    model = lmopt.Model.from_module(family(name), context_length=128)
    small = model
    for one in steps:
        function, step = _STEPS[one]
        small = small.with_module(function(small.module, step, setting()), recipe=[step.to_dict()])
    artifact = lmopt.Exporter("onnx", target=target).export(small, tmp_path / "out")
    written = artifact.manifest["formats"]["onnx"]
    assert written["target"] == target
    assert "fallback" not in written
    assert artifact.manifest["parity"]["onnx"]["tolerance"]["name"] == "float32"
    import onnx

    graph = onnx.load(artifact.file("model.onnx")).graph
    stored = sum(math.prod(one.dims) for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT)
    # Tables of rotary angles and the like come on top.
    assert stored < small.facts.parameters + 5000
    assert small.facts.parameters < 0.95 * model.facts.parameters


def test_unequal_widths_are_written_as_weights_too(tmp_path: Path) -> None:
    model = lmopt.Model.from_module(family("gpt2"))
    function, step = _STEPS["unequal"]
    small = model.with_module(function(model.module, step, setting()))
    lmopt.Exporter("safetensors").export(small, tmp_path / "out")
    assert lmopt.Model.from_pretrained(tmp_path / "out").fingerprint() == small.fingerprint()
