"""Scales that 16 bits hold are stored in 16 bits, and nothing that is computed changes."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx_ir as ir

from lmopt.backends.onnxruntime.session import ort
from lmopt.backends.torch.half_scales import store_halves

ROWS, COLUMNS, BLOCK = 512, 64, 32


def graph_with(scales: np.ndarray) -> ir.Model:
    """One product and one look-up that share their tensors, as a tied embedding and head do."""
    random = np.random.default_rng(0)
    tensors = {
        "codes": random.integers(0, 256, (ROWS, COLUMNS // BLOCK, BLOCK // 2), np.uint8),
        "scales": scales,
    }
    values = {}
    for name, array in tensors.items():
        values[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        values[name].shape, values[name].type = (
            ir.Shape(array.shape),
            ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
    x = ir.Value(name="x", shape=ir.Shape(["n", COLUMNS]), type=ir.TensorType(ir.DataType.FLOAT))
    product = ir.node(
        "MatMulNBits",
        [x, values["codes"], values["scales"]],
        {"K": COLUMNS, "N": ROWS, "bits": 4, "block_size": BLOCK, "accuracy_level": 1},
        domain="com.microsoft",
    )
    again = ir.node(
        "MatMulNBits",
        [x, values["codes"], values["scales"]],
        {"K": COLUMNS, "N": ROWS, "bits": 4, "block_size": BLOCK, "accuracy_level": 4},
        domain="com.microsoft",
    )
    for number, node in enumerate((product, again)):
        node.outputs[0].name = f"y{number}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["n", ROWS])
    graph = ir.Graph(
        [x],
        [product.outputs[0], again.outputs[0]],
        nodes=[product, again],
        initializers=list(values.values()),
        opset_imports={"": 21, "com.microsoft": 1},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, path: Path) -> list[np.ndarray]:
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=0)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((3, COLUMNS)).astype(np.float32)
    return list(session.run(None, {"x": x}))


def drawn(*, halves: bool) -> np.ndarray:
    scales = np.random.default_rng(2).uniform(0.01, 0.1, (ROWS, COLUMNS // BLOCK)).astype(np.float32)
    return scales.astype(np.float16).astype(np.float32) if halves else scales


def test_what_16_bits_hold_takes_half_and_computes_the_same(tmp_path: Path) -> None:
    before = run(graph_with(drawn(halves=True)), tmp_path / "before")
    model = graph_with(drawn(halves=True))
    store_halves(model)
    after = run(model, tmp_path / "after")
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    saved = (tmp_path / "before.data").stat().st_size - (tmp_path / "after.data").stat().st_size
    assert saved == 2 * ROWS * COLUMNS // BLOCK
    assert [node.op_type for node in model.graph] == ["Cast", "MatMulNBits", "MatMulNBits"]


@pytest.mark.parametrize("odd", [1e-9, 1e6, 0.1])
def test_one_scale_that_16_bits_do_not_hold_keeps_all(odd: float) -> None:
    scales = drawn(halves=True)
    scales[7, 1] = odd
    model = graph_with(scales)
    store_halves(model)
    assert [node.op_type for node in model.graph] == ["MatMulNBits", "MatMulNBits"]
    assert np.array_equal(model.graph.initializers["scales"].const_value.numpy(), scales)
