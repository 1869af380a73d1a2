"""Every form that the compiler refuses is one of our errors, with its words and the node's name."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lmopt.backends.tensorrt.building import BuildOptions, build_plan
from lmopt.backends.tensorrt.flavour import load
from lmopt.backends.tensorrt.network import Network
from lmopt.backends.tensorrt.profiles import Profile
from lmopt.errors import EngineBuildError, UnsupportedPrecisionError
from lmopt.types import ModelFacts

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
FACTS = ModelFacts(64)
PROFILE = Profile("only", (1, 2, 4), (1, 4, 8), (0, 0, 0))


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs, outputs, name=f"the_{operator}", **attributes)


def refused(path, words):
    with Network(load("tensorrt_rtx")) as network, pytest.raises(EngineBuildError, match=words) as caught:
        network.parse(path)
    return str(caught.value)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
def test_a_zero_point_that_is_not_zero(kind, written):
    tensors = {"s": np.float32(0.1), "z": kind(3)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    assert "the_QuantizeLinear" in refused(written(nodes, tensors), "cannot read")


def test_unsigned_four_bit_weights(written):
    codes = onnx.numpy_helper.from_array(np.zeros((64, 64), ml_dtypes.uint4), "q")
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=32),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    refused(written(nodes, {"q": codes, "s": np.ones((2, 64), np.float32)}), "cannot read")


def test_eight_bit_weights_with_negative_scales(written):
    nodes = [
        node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=32),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    tensors = {"q": np.zeros((64, 64), np.int8), "s": -np.ones((2, 64), np.float32)}
    assert "the_DequantizeLinear" in refused(written(nodes, tensors), "must all be positive")


def test_dynamic_quantization(written):
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    assert "DynamicQuantizeLinear" in refused(written(nodes), "cannot read")


def test_products_of_whole_numbers(written):
    path = written(
        [node("MatMulInteger", ["x", "w"], ["y"])],
        {"w": np.zeros((64, 64), np.int8)},
        dtype=TensorProto.INT8,
        out_dtype=TensorProto.INT32,
    )
    assert "MatMulInteger" in refused(path, "cannot read")


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_onnxruntimes_own_four_bit_products(dtype, foreign):
    assert "fused" in refused(foreign(dtype), "cannot read")


def test_two_types_in_one_product(written):
    path = written([node("MatMul", ["x", "w"], ["y"])], {"w": np.zeros((64, 64), np.float16)})
    assert "the_MatMul" in refused(path, "same (input )?type|INVALID_NODE")


def test_a_circular_cache(written):
    cache = helper.make_tensor_value_info("x", HALF, ("batch_size", 2, 16, 8))
    new = helper.make_tensor_value_info("new", HALF, ("batch_size", 2, 1, 8))
    at = helper.make_tensor_value_info("at", TensorProto.INT64, ("batch_size",))
    path = written(
        [node("TensorScatter", ["x", "new", "at"], ["y"], axis=2, mode="circular")],
        dtype=HALF,
        inputs=[cache, new, at],
        out=("batch_size", 2, 16, 8),
        opset=24,
    )
    assert "TensorScatter" in refused(path, "cannot read")


def attention(written, dtype, outputs=("y",)):
    shape = ("batch_size", 4, "sequence_length", 16)
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "k", "v")]
    return written(
        [node("Attention", ["x", "k", "v"], list(outputs))], dtype=dtype, inputs=inputs, out=shape, opset=23
    )


def test_attention_that_returns_its_cache(written):
    assert "Attention" in refused(attention(written, HALF, ("y", "pk", "pv")), "one output|cannot read")


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_attention_is_built_from_products_where_there_is_no_kernel(dtype, written):
    """The compiler alone refuses opset 23's Attention in float32; decomposed it takes it."""
    options = BuildOptions("tensorrt_rtx", ("8.6",), profiles=(PROFILE,))
    assert len(build_plan(attention(written, dtype), options, facts=FACTS).data) > 1000


def test_attention_in_float32_without_that_is_refused(written, monkeypatch):
    monkeypatch.setattr(Network, "_decompose_attention", lambda self: None)
    options = BuildOptions("tensorrt_rtx", ("8.6",), profiles=(PROFILE,))
    with pytest.raises(EngineBuildError, match="not supported by a dedicated kernel"):
        build_plan(attention(written, FLOAT), options, facts=FACTS)


def test_weights_in_another_file_that_is_not_there(written, tmp_path):
    path = written([node("MatMul", ["x", "w"], ["y"])], {"w": np.ones((64, 64), np.float32)})
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with Network(load("tensorrt_rtx")) as network:
        network.parse(path)  # beside the graph it is found
    (tmp_path / "weights.bin").unlink()
    refused(path, "cannot read")


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    refused(tmp_path / "model.onnx", "cannot read")


def quantized(written, kind):
    """Activations and weights in 8 bits: `float8e4m3` or `int8`, products between them."""
    zero = onnx.numpy_helper.from_array(np.zeros((), kind), "z")
    codes = onnx.numpy_helper.from_array(np.ones((64, 64), np.float32).astype(kind), "q")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="quantize"),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"], name="activations"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], name="weights"),
        node("MatMul", ["xd", "w"], ["y"]),
    ]
    return written(nodes, {"q": codes, "z": zero, "s": np.float16(0.05)}, dtype=HALF)


@pytest.mark.parametrize(
    ("kind", "target", "builds"),
    [
        (np.int8, "7.5", True),
        (np.int8, "8.9", True),
        (ml_dtypes.float8_e4m3fn, "8.6", False),
        (ml_dtypes.float8_e4m3fn, "8.9", True),
        (ml_dtypes.float8_e4m3fn, "12.0", True),
    ],
)
def test_quantized_activations(kind, target, builds, written):
    options = BuildOptions("tensorrt_rtx", (target,), profiles=(PROFILE,))
    path = quantized(written, kind)
    if builds:
        plan = build_plan(path, options, facts=FACTS)
        assert plan.types["int8" if kind is np.int8 else "fp8"] >= 2
    else:
        with pytest.raises(UnsupportedPrecisionError, match=r"8\.6 does not compute in fp8"):
            build_plan(path, options, facts=FACTS)
