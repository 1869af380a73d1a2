"""Quantized models as graphs: the gate holds them to their eager selves, in both dialects."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import lmopt
from lmopt.backends.torch.compressing import by_matrix
from lmopt.backends.torch.quantized import QuantizedEmbedding, QuantizedLinear, quantized_parts
from lmopt.backends.torch.quantizing import set_part
from lmopt.compression import Quantize
from lmopt.compression.layout import Grid, QuantizedArray
from lmopt.compression.step import Setting
from lmopt.errors import UnsupportedOptionError
from lmopt.exporter import weight_bytes
from lmopt.testing.models import tiny_llama

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")


def with_offsets(model: lmopt.Model) -> lmopt.Model:
    """Give an asymmetric model half precision offsets, as GGUF's Q4_1 has them."""
    random = np.random.default_rng(0)
    for path, part in quantized_parts(model.module).items():
        old, grid = part.array(), part.grid
        assert old.zero_points is not None
        scales = old.scales.astype(np.float16).astype(np.float32)
        offsets = -scales * (old.zero_points + random.uniform(-0.5, 0.5, scales.shape).astype(np.float32))
        form = Grid(grid.rows, grid.columns, grid.bits, grid.group_size, "offset")
        array = QuantizedArray(form, old.codes, scales, offsets=offsets.astype(np.float16).astype(np.float32))
        set_part(
            model.module,
            path,
            QuantizedEmbedding(array) if isinstance(part, QuantizedEmbedding) else QuantizedLinear(array),
        )
    return model


def small_model(kind: str) -> lmopt.Model:
    model = lmopt.Model.from_module(tiny_llama())
    step = {
        "int4": Quantize(4, 32),
        "int8": Quantize(8, 16, symmetric=False),
        "offset": Quantize(4, 16, symmetric=False, embedding=4, head=4),
    }[kind]
    small = model.with_module(by_matrix(model.module, step, Setting(model.facts.vocab_size)))
    return with_offsets(small) if kind == "offset" else small


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("int4", "portable"),
        pytest.param("int8", "portable", marks=pytest.mark.sweep),
        ("offset", "portable"),
        ("int4", "onnxruntime"),
        ("int8", "onnxruntime"),
        pytest.param("offset", "onnxruntime", marks=pytest.mark.sweep),  # rounded activations below
    ],
)
def test_a_graph_computes_what_eager_does(kind: str, target: str, tmp_path: Path) -> None:
    artifact = lmopt.Exporter("onnx", target=target).export(small_model(kind), tmp_path / "out")
    written = artifact.manifest["formats"]["onnx"]
    assert written["target"] == target
    operators = set(written["operators"])
    if target == "portable":
        assert "DequantizeLinear" in operators
    else:
        assert {"MatMulNBits", "GatherBlockQuantized"} <= operators
        assert "MatMul" not in operators
    assert "accuracy_level" not in written
    assert artifact.manifest["parity"]["onnx"]["tolerance"]["name"] == "float32"


def test_quantized_weights_count_as_they_are_stored(tmp_path: Path) -> None:
    model = small_model("int4")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - it is no mapping
    # Frequencies of positions are no weights and not in the file.
    assert 0 <= weight_bytes(model) - stored < 0.01 * stored


@pytest.mark.parametrize("kind", ["int8", "offset"])
def test_rounded_activations_are_asked_for_by_name(kind: str, tmp_path: Path) -> None:
    exporter = lmopt.Exporter("onnx", target="onnxruntime", accuracy_level=4)
    artifact = exporter.export(small_model(kind), tmp_path / "out")
    assert artifact.manifest["formats"]["onnx"]["accuracy_level"] == 4
    assert artifact.manifest["parity"]["onnx"]["tolerance"]["name"] == "int8-activations"
    import onnx

    graph = onnx.load(artifact.file("model.onnx"), load_external_data=False).graph
    levels = {a.i for node in graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4}


def test_the_portable_dialect_has_no_accuracy_level(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="accuracy_level"):
        lmopt.Exporter("onnx", accuracy_level=4).export(small_model("int4"), tmp_path / "out")
