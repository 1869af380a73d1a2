"""Encoders compute no padding, and nobody can tell."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

import lmopt
from lmopt.backends.torch.fused.edits import Edits
from lmopt.backends.torch.fused.unpadded import skip_padding
from lmopt.testing.seq2seq import tiny_bart, tiny_whisper
from lmopt.types import TOKENS

SOURCES = [[5, 6, 7, 8, 9, 10, 11], [40, 41, 42], [3], [9, 8, 7, 6, 5, 4, 3]]
# `between` stands behind the product that works token by token.
GRAPH = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[b,s,4] x, int64[b,s] mask) => (float[b,s,4] out)
<float[4,4] w = {{1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}}, float[4] bias = {{1,2,3,4}}, int64 one = {{1}},
 float[1,4,4] w3 = {{1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}},
 float[4,4,3] kernel = {{{kernel}}}>
{{
  product = MatMul (x, w)
  sum = Add (product, bias)
  {between}
}}
"""
ATTENTION = """
  hidden = Cast <to = 6> (mask)
  seen = com.microsoft.MultiHeadAttention <num_heads = 2> (sum, sum, sum, , hidden)
  plus = Add (seen, x)
  again = MatMul (plus, w)
  out = Transpose <perm = [0, 1, 2]> (again)
"""
CONVOLUTION = """
  turned = Transpose <perm = [0, 2, 1]> (sum)
  mixed = Conv <pads = [1, 1]> (turned, kernel)
  out = Transpose <perm = [0, 2, 1]> (mixed)
"""


def edits_of(between: str) -> Edits:
    text = GRAPH.format(between=between, kernel=",".join(["1"] * 48))
    edits = Edits(ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))), {})
    for node in edits.graph:
        if node.op_type == "MultiHeadAttention":
            # As the trace says it; ONNX's own inference does not know the operator.
            node.outputs[0].shape, node.outputs[0].type = node.inputs[0].shape, node.inputs[0].type
    return edits


@pytest.mark.parametrize(
    "between",
    [
        CONVOLUTION,
        # Without a mask attention sees padding.
        ATTENTION.replace("(sum, sum, sum, , hidden)", "(sum, sum, sum)"),
        # Between the product and attention: a sum along the source, a norm along it, a product of rows with rows, one
        # with a matrix for each row, and a look at the mask of whole rows.
        ATTENTION.replace("(sum, sum, sum,", "(along, along, along,").replace(
            "hidden =", "along = CumSum (sum, one)\n hidden ="
        ),
        ATTENTION.replace("(sum, sum, sum,", "(along, along, along,").replace(
            "hidden =", "along = LayerNormalization <axis = 1> (sum, bias)\n hidden ="
        ),
        ATTENTION.replace("(sum, sum, sum,", "(among, among, among,").replace(
            "hidden =",
            "turned = Transpose <perm = [0, 2, 1]> (sum)\n both = MatMul (sum, turned)\n"
            "among = MatMul (both, sum)\n hidden =",
        ),
        ATTENTION.replace("(sum, sum, sum,", "(each, each, each,").replace(
            "hidden =", "each = MatMul (sum, w3)\n hidden ="
        ),
    ],
    ids=[
        "convolution",
        "no mask",
        "sum along the source",
        "norm along the source",
        "among tokens",
        "a matrix of rows",
    ],
)
def test_what_may_look_at_padding_keeps_it(between: str) -> None:
    edits = edits_of(between)
    before = [(node.op_type, node.inputs) for node in edits.graph]
    assert skip_padding(edits, edits.graph.inputs[1], edits.graph.outputs) == 0
    assert [(node.op_type, node.inputs) for node in edits.graph] == before


def test_an_output_that_somebody_may_sum_keeps_its_padding() -> None:
    edits = edits_of(ATTENTION)
    assert skip_padding(edits, edits.graph.inputs[1], []) == 0


def test_tokens_are_packed_around_attention_alone() -> None:
    edits = edits_of(ATTENTION)
    first = next(node for node in edits.graph if node.op_type == "MatMul")
    assert skip_padding(edits, edits.graph.inputs[1], edits.graph.outputs) == 4
    kinds = [node.op_type for node in edits.graph]
    assert first.inputs[0].producer().op_type == "Gather"
    # Two values enter the first part (`x` once), one attention's, and two leave.
    assert kinds.count("Gather") == 4
    shapes = {value.name: value.shape for node in edits.graph for value in node.outputs}
    assert [name for name, shape in shapes.items() if shape and shape[0] == TOKENS] == [
        "product",
        "sum",
        "plus",
        "again",
    ]


def test_padding_before_between_and_after_tokens() -> None:
    """The mask may hide any places; what they hold is some token's."""
    edits = edits_of(ATTENTION)
    attention = next(node for node in edits.graph if node.op_type == "MultiHeadAttention")
    assert skip_padding(edits, edits.graph.inputs[1], edits.graph.outputs) == 4
    # In place of attention, which the evaluator does not know: what does not look at other places.
    plain = edits.node("Identity", [attention.inputs[0]], attention)
    edits.replace(attention.outputs[0], plain.outputs[0])
    edits.graph.remove(attention, safe=True)
    evaluator = ReferenceEvaluator(ir.to_proto(edits.model))
    draw = np.random.default_rng(0)
    x = draw.standard_normal((3, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 0, 1], [1, 1, 1, 1, 1]])
    (found,) = evaluator.run(None, {"x": x, "mask": mask})
    w, bias = (edits.graph.initializers[name].const_value.numpy() for name in ("w", "bias"))
    expected = ((x @ w + bias) + x) @ w
    np.testing.assert_allclose(found[mask != 0], expected[mask != 0], rtol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("unpadded") / "out"
    lmopt.Exporter("onnx", target="onnxruntime").export(lmopt.Model.from_module(tiny_bart()), target)
    return target


def test_sources_of_a_batch_are_read_as_alone(folder: Path) -> None:
    graph = onnx.load(str(folder / "encoder_model.onnx")).graph
    assert sum(node.op_type == "NonZero" for node in graph.node) == 1
    with lmopt.Runtime(folder) as runtime, lmopt.Runtime(lmopt.Model.from_module(tiny_bart())) as eager:
        prompts = [[2, 7]] * len(SOURCES)
        together = runtime.logits(prompts, sources=SOURCES)
        for one, source in zip(together, SOURCES, strict=True):
            np.testing.assert_allclose(one, runtime.logits([2, 7], sources=source), atol=2e-6)
            np.testing.assert_allclose(one, eager.logits([2, 7], sources=source), atol=2e-5)


def test_values_are_shown_in_rows(folder: Path) -> None:
    record: dict[str, Any] = lmopt.Artifact.open(folder).manifest["formats"]["onnx"]
    taps = dict(record["encoder_taps"])
    packed = [path for path, name in taps.items() if name.endswith(TOKENS)]
    assert [path for path in packed if path.endswith("encoder.layers.0")]
    source = np.array([SOURCES[0], SOURCES[3]])
    ids = np.array([[2, 7], [2, 7]])
    with lmopt.Runtime(folder) as runtime, lmopt.Runtime(lmopt.Model.from_module(tiny_bart())) as eager:
        names = sorted(set(packed) & set(eager.engine.tap_names()))
        assert len(names) > 10
        found = runtime.engine.taps(ids, names, source=source)
        expected = eager.engine.taps(ids, names, source=source)
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)


def test_features_have_no_padding(tmp_path: Path) -> None:
    lmopt.Exporter("onnx", target="onnxruntime").export(
        lmopt.Model.from_module(tiny_whisper()), tmp_path / "out"
    )
    graph = onnx.load(str(tmp_path / "out" / "encoder_model.onnx")).graph
    assert "NonZero" not in {node.op_type for node in graph.node}
