"""What a mask lets be seen is found by computing it, and nothing that only looks like it is taken for it."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lmopt.backends.torch.fused.appending import append_inside, mask_inside
from lmopt.backends.torch.fused.edits import Edits
from lmopt.backends.torch.graph import inputs_of
from lmopt.signature import SOURCE_MASK, Signature
from lmopt.types import TensorSpec

LONGEST = 64
PAST = ("batch_size", 2, "past_sequence_length", 4)
SIGNATURE = Signature.from_graph(
    [
        TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),
        TensorSpec("past_key_values.0.decoder.key", "float32", PAST),
        TensorSpec("past_key_values.0.decoder.value", "float32", PAST),
        TensorSpec("encoder_attention_mask", "int64", ("batch_size", "encoder_sequence_length")),
    ],
    [
        TensorSpec("logits", "float32", ("batch_size", "sequence_length", 8)),
        TensorSpec("present.0.decoder.key", "float32", PAST),
        TensorSpec("present.0.decoder.value", "float32", PAST),
    ],
)
# What of a row's own tokens a query sees: `seen`, of the numbers of keys and queries.
SELF = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (int64[b,s] ids, float[b,2,p,4] pk, float[b,2,p,4] pv, int64[b,e] source_mask, float[b,s,8] x)
  => (float[b,s,8] out, float[b,2,t,4] key, float[b,2,t,4] value)
<float hidden = {hidden}, float zero = {{0}}, int64 window = {{ {window} }}, int64 first = {{0}}, int64 one = {{1}},
 int64[1] axis0 = {{0}}, int64[1] axis1 = {{1}}, int64[2] front = {{0, 1}}, int64[4] apart = {{0, 0, 2, 4}}>
{{
  past1 = Shape <start = 2, end = 3> (pk)
  new1 = Shape <start = 1, end = 2> (ids)
  past = Squeeze (past1)
  new = Squeeze (new1)
  total = Add (past, new)
  keys = Range (first, total, one)
  queries = Range (past, total, one)
  row = Unsqueeze (keys, axis0)
  column = Unsqueeze (queries, axis1)
  before = LessOrEqual (row, column)
  border = Add (row, window)
  near = Greater (border, column)
  seen = And (before, near)
  added = Where (seen, zero, hidden)
  mask = Unsqueeze (added, front)
  split = Reshape (x, apart)
  turned = Transpose <perm = [0, 2, 1, 3]> (split)
  key = Concat <axis = -2> (pk, turned)
  value = Concat <axis = -2> (pv, turned)
  out = com.microsoft.MultiHeadAttention <num_heads = 2> (x, key, value, , , mask)
}}
"""


def graph_of(text: str) -> Edits:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    graph = model.graph
    # `x` stands for what a decoder makes of its ids: no input of it.
    graph.inputs.pop()
    return Edits(model, {})


def attention(edits: Edits) -> ir.Node:
    (node,) = [one for one in edits.graph if one.op_type == "MultiHeadAttention"]
    return node


def with_shapes(edits: Edits) -> Edits:
    for node in edits.graph:
        if node.op_type == "Reshape":
            batch, new = ir.SymbolicDim("b"), ir.SymbolicDim("s")
            node.inputs[0].shape, node.outputs[0].shape = (
                ir.Shape([batch, new, 8]),
                ir.Shape([batch, new, 2, 4]),
            )
    return edits


@pytest.mark.parametrize(
    ("window", "hidden", "taken"),
    [
        (10_000, "-3.4e38", True),
        (LONGEST, "-3.4e38", True),
        (LONGEST - 1, "-3.4e38", False),  # only the longest row shows it
        (2, "-3.4e38", False),
        (10_000, "-5.0", False),  # a penalty hides nothing
    ],
)
def test_a_mask_that_looks_back_only_becomes_an_attribute(window: int, hidden: str, taken: bool) -> None:
    edits = with_shapes(graph_of(SELF.format(window=window, hidden="{" + hidden + "}")))
    append_inside(edits)
    mask_inside(edits, inputs_of(SIGNATURE), SOURCE_MASK, LONGEST)
    node = attention(edits)
    assert [one.name for one in node.inputs[6:8]] == ["pk", "pv"]
    assert [one.name for one in edits.graph.outputs] == [one.name for one in node.outputs]
    assert ("unidirectional" in node.attributes) == taken
    assert (node.inputs[5] is None) == taken


def test_without_a_cache_of_its_own_the_operator_is_not_trusted_with_it() -> None:
    """It would take the first query to stand at the first key."""
    edits = graph_of(SELF.format(window=10_000, hidden="{-3.4e38}"))
    mask_inside(edits, inputs_of(SIGNATURE), SOURCE_MASK, LONGEST)
    assert "unidirectional" not in attention(edits).attributes
    assert attention(edits).inputs[5] is not None


SOURCE = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (int64[b,s] ids, float[b,2,p,4] pk, float[b,2,p,4] pv, int64[b,e] source_mask, float[b,s,8] x) => (float[b,s,8] out)
<float lowest = {{-3.4e38}}, float zero = {{0}}, int64 border = {{ {border} }}, int64[2] middle = {{1, 2}}>
{{
  seen = Greater (source_mask, border)
  added = Where (seen, zero, lowest)
  mask = Unsqueeze (added, middle)
  out = com.microsoft.MultiHeadAttention <num_heads = 2> (x, pk, pv, , , mask)
}}
"""


@pytest.mark.parametrize(("border", "taken"), [(0, True), (-1, False)])
def test_a_mask_of_the_source_is_handed_on_as_it_is(border: int, taken: bool) -> None:
    edits = graph_of(SOURCE.format(border=border))
    mask_inside(edits, inputs_of(SIGNATURE), SOURCE_MASK, LONGEST)
    node = attention(edits)
    assert (node.inputs[5] is None) == taken
    if taken:
        assert node.inputs[4].producer().inputs[0].name == "source_mask"
        assert node.attributes["mask_filter_value"].as_float() == np.finfo(np.float32).min


WINDOW = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (int64[b,s] ids, int64[b,s] padded, float[b,s,8] x) => (float[b,s,8] out)
<float lowest = {{-3.4e38}}, float zero = {{0}}, int64 window = {{ {window} }}, int64 first = {{0}}, int64 one = {{1}},
 int64[1] axis0 = {{0}}, int64[1] axis1 = {{1}}, int64[2] middle = {{1, 2}}, int64[2] front = {{0, 1}}>
{{
  token = Greater (padded, first)
  wide = Unsqueeze (token, middle)
  length1 = Shape <start = 1, end = 2> (ids)
  length = Squeeze (length1)
  places = Range (first, length, one)
  row = Unsqueeze (places, axis0)
  column = Unsqueeze (places, axis1)
  apart = Sub (row, column)
  far = Abs (apart)
  near = Less (far, window)
  nears = Unsqueeze (near, front)
  seen = And (wide, nears)
  mask = Where (seen, zero, lowest)
  out = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x, , , mask)
}}
"""


@pytest.mark.parametrize("window", [2, 64, 10_000])
def test_a_window_of_an_encoder_is_no_padding(window: int) -> None:
    """A short source does not show it, so that each query has a line of its own is enough."""
    edits = graph_of(WINDOW.format(window=window))
    inputs = [
        TensorSpec(name, "int64", ("batch_size", "encoder_sequence_length")) for name in ("input_ids", "mask")
    ]
    mask_inside(edits, inputs, "mask", LONGEST)
    node = attention(edits)
    assert node.inputs[4] is None
    assert node.inputs[5] is not None


def test_sources_of_one_length_have_padding_too() -> None:
    edits = graph_of(SOURCE.format(border=0))
    fixed = [*inputs_of(SIGNATURE)[:-1], TensorSpec(SOURCE_MASK, "int64", ("batch_size", 20))]
    mask_inside(edits, fixed, SOURCE_MASK, LONGEST)
    assert attention(edits).inputs[5] is None
