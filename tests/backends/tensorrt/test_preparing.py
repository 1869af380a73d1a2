"""What is changed before TensorRT reads a graph changes no value: ONNX Runtime runs the very file."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from lmopt.backends.tensorrt.engine_cache import graph_of
from lmopt.backends.tensorrt.preparing import prepare
from lmopt.errors import UnsupportedError, UnsupportedPrecisionError
from lmopt.evaluation.tolerances import tolerance_for
from lmopt.signature import Signature
from lmopt.testing import models


def run(prepared, ids, split):
    """Run the prepared file on ONNX Runtime in two calls, the second on the state of the first."""
    settings = onnxruntime.SessionOptions()
    # As it stands: onnxruntime would fuse products of 4-bit weights into operators of its own.
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(prepared.path), settings, providers=["CPUExecutionProvider"])
    signature = Signature.from_graph(prepared.inputs, prepared.outputs)
    state, found = signature.begin(len(ids)), []
    for part in (ids[:, :split], ids[:, split:]):
        step = signature.step(part, np.full(len(ids), part.shape[1]), state)
        names = ["logits", *(one.present for one in signature.state)]
        logits, *present = session.run(names, {**step.feeds, **state.tensors})
        found.append(logits.astype(np.float32))
        state.tensors = {one.past.name: value for one, value in zip(signature.state, present, strict=True)}
        state.mask, state.lengths = step.mask, step.lengths
    return np.concatenate(found, axis=1)


SWEEP = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "precision", "spelled_out"),
    [
        ("lstm", "float32", 0),
        ("lstm", "float32+int8", 2),
        ("lstm", "float32+int4-asymmetric", 2),
        # Tables are in 8 bits, and alone have the negative scales that RTX refuses.
        ("lstm", "float32+int4-64", 1),
        ("llama", "float16+int4", 1),
        ("wide", "float16+int4-128", 1),
        ("wide", "float16+int8-rounded", 9),
        pytest.param("lstm", "float32+int8-asymmetric", 2, marks=SWEEP),
        pytest.param("llama", "float32", 0, marks=SWEEP),
        pytest.param("llama", "float32+int8", 16, marks=SWEEP),
        pytest.param("llama", "float32+int4", 1, marks=SWEEP),
        pytest.param("llama", "float32+int4-asymmetric", 16, marks=SWEEP),
        pytest.param("llama", "float32+int8-asymmetric", 16, marks=SWEEP),
        pytest.param("llama", "float32+int4-64", 1, marks=SWEEP),
    ],
)
def test_the_prepared_file_computes_what_torch_does(family, precision, spelled_out, exported, make, tmp_path):
    prepared = prepare(graph_of(exported(family, precision)), tmp_path)
    assert prepared.changes["spelled out"] == spelled_out
    ids = np.random.default_rng(0).integers(3, models.VOCAB_SIZE, (2, 12))
    module = make(family, precision)
    with torch.no_grad():
        result = module(torch.from_numpy(ids))
    wanted = (result.logits if hasattr(result, "logits") else result[0]).float().numpy()
    limits = tolerance_for("float32")
    atol = 0.05 if "float16" in precision else limits.atol
    np.testing.assert_allclose(run(prepared, ids, 7), wanted, atol=atol, rtol=limits.rtol)


def test_spelled_out_weights_are_equal_bit_by_bit(exported, make, tmp_path):
    """Dequantized by the prepared graph, each weight is what the layout says."""
    artifact = exported("lstm", "float32+int8")
    prepared = prepare(graph_of(artifact), tmp_path)
    graph = ir.load(prepared.path).graph
    module = make("lstm", "float32+int8")
    expected = {part.array().values().tobytes() for part in module.modules() if hasattr(part, "array")}
    seen = set()
    for node in graph:
        if node.op_type == "DequantizeLinear":
            codes = node.inputs[0].const_value.numpy().astype(np.float32)
            product = next(iter(next(iter(node.outputs[0].uses())).node.outputs[0].uses())).node
            assert product.op_type == "Mul"
            scales = product.inputs[1].const_value.numpy()
            seen.add((codes.reshape(*scales.shape[:2], -1) * scales).reshape(codes.shape).tobytes())
    assert seen == expected


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=SWEEP)])
def test_norms_and_softmax_of_half_types_are_in_float32(dtype, exported, tmp_path):
    prepared = prepare(graph_of(exported("gpt", dtype)), tmp_path)
    assert prepared.changes["widened"] == 7  # five norms, two layers of attention
    for node in ir.load(prepared.path).graph:
        if node.op_type in {"LayerNormalization", "Softmax"}:
            assert node.inputs[0].producer().op_type == "Cast"
            assert node.inputs[0].dtype == ir.DataType.FLOAT


def test_widening_keeps_the_numbers_of_a_half_model(exported, make, tmp_path):
    prepared = prepare(graph_of(exported("gpt", "float16")), tmp_path)
    ids = np.random.default_rng(1).integers(3, models.VOCAB_SIZE, (1, 10))
    module = make("gpt", "float16").float()
    with torch.no_grad():
        wanted = module(torch.from_numpy(ids))[0].numpy()
    found = run(prepared, ids, 4)
    assert np.abs(found - wanted).max() < 0.05
    assert np.abs(found - wanted).max() > 0  # it is not the float32 model that ran


def test_a_sum_of_squares_beyond_float16_stays_finite(written, tmp_path):
    node = helper.make_node("LayerNormalization", ["x", "g"], ["n"], axis=-1, stash_type=10)
    path = written(
        [node, helper.make_node("Identity", ["n"], ["y"])],
        {"g": np.ones(64, np.float16)},
        dtype=TensorProto.FLOAT16,
    )
    (tmp_path / "out").mkdir()
    prepared = prepare(path, tmp_path / "out")
    assert prepared.changes["widened"] == 1
    x = np.linspace(-3000, 3000, 64, dtype=np.float16)[None]
    y = onnxruntime.InferenceSession(str(prepared.path)).run(None, {"x": x})[0]
    assert np.isfinite(y).all()
    assert abs(float(y.std()) - 1) < 0.01


@pytest.mark.parametrize("where", ["input", "initializer", "cast"])
def test_float64_is_refused_and_named(where, written, tmp_path):
    double = TensorProto.DOUBLE
    if where == "cast":
        nodes = [helper.make_node("Cast", ["x"], ["d"], to=double, name="to_double")]
        nodes.append(helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT))
        path, named = written(nodes), "to_double"
    elif where == "input":
        path, named = written([helper.make_node("Relu", ["x"], ["y"])], dtype=double), "x"
    else:
        nodes = [
            helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["x", "f"], ["y"]),
        ]
        path, named = written(nodes, {"w": np.ones(64)}), "w"
    with pytest.raises(UnsupportedPrecisionError, match=f"'{named}' is in float64"):
        prepare(path, tmp_path)


def test_operators_of_another_engine_are_refused_and_named(foreign, tmp_path):
    with pytest.raises(UnsupportedError, match=r"'fused' is com\.microsoft::MatMulNBits"):
        prepare(foreign(), tmp_path)
