"""Rows that hold one source hold it once, and say what they would say with one of their own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import lmopt
from lmopt.backends.torch.fused.edits import Edits
from lmopt.backends.torch.fused.shared_sources import share_sources
from lmopt.generation.sources import pack
from lmopt.testing.seq2seq import tiny_bart, tiny_whisper

SOURCES = [np.array(one) for one in ([5, 6, 7, 8, 9, 10, 11], [40, 41, 42], [9, 8, 7, 6])]
GRAPH = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[b,s,4] x, float[b,2,e,2] key, float[b,2,e,2] value, int64[b,e] mask) => (float[b,s,4] out)
{
  hidden = Cast <to = 6> (mask)
  seen = com.microsoft.MultiHeadAttention <num_heads = 2> (x, key, value, , hidden)
  %s
}
"""


def edits_of(rest: str, attention: str = "") -> Edits:
    text = GRAPH % rest
    if attention:
        text = text.replace("(x, key, value, , hidden)", attention)
    return Edits(ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))), {})


def test_attention_to_a_source_is_asked_by_all_its_rows() -> None:
    edits = edits_of("out = Identity (seen)")
    assert share_sources(edits, edits.graph.inputs[1:])
    kinds = [node.op_type for node in edits.graph]
    assert kinds == [
        "Cast",
        "Shape",
        "Shape",
        "Concat",
        "Reshape",
        "MultiHeadAttention",
        "Reshape",
        "Identity",
    ]
    attention = next(node for node in edits.graph if node.op_type == "MultiHeadAttention")
    assert attention.attributes["num_heads"].as_int() == 2
    assert [value and value.name for value in attention.inputs[1:]] == ["key", "value", None, "hidden"]


@pytest.mark.parametrize(
    ("rest", "attention"),
    [
        ("sum = ReduceSum (key)\n out = Add (seen, sum)", ""),
        ("sizes = Shape (mask)\n out = Reshape (seen, sizes)", ""),
        ("out = Identity (seen)", "(x, key, value, , hidden, x)"),
        ("out = Identity (seen)", "(x, key, x, , hidden)"),
    ],
    ids=["a reader beside", "a mask's size", "a bias of rows", "values of rows"],
)
def test_what_belongs_to_rows_stays_theirs(rest: str, attention: str) -> None:
    edits = edits_of(rest, attention)
    before = [(node.op_type, node.inputs) for node in edits.graph]
    assert not share_sources(edits, edits.graph.inputs[1:])
    assert [(node.op_type, node.inputs) for node in edits.graph] == before


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    target = tmp_path_factory.mktemp("shared") / "out"
    model = lmopt.Model.from_module(tiny_bart())
    lmopt.Exporter("onnx", target="onnxruntime").export(model, target)
    with lmopt.Runtime(target) as runtime, lmopt.Runtime(model) as eager:
        yield runtime.engine, eager.engine


def held(state: Any) -> int:
    return int(state.tensors["past_key_values.0.encoder.key"].shape()[0])


def test_beams_hold_their_source_once(engines: tuple[Any, Any]) -> None:
    engine = engines[0]
    state = engine.encode(*pack(SOURCES))
    for rows, number in [
        ([0, 0, 1, 1, 2, 2], 3),
        ([1, 0, 3, 3, 4, 5], 3),  # beams that change places
        ([2, 3, 4, 5], 2),  # a text that is done
        ([0, 1, 2], 3),  # unequal numbers: each row its own
        ([2], 1),
    ]:
        state = engine.select(state, np.array(rows))
        assert held(state) == number
        shown = engine.encoded(state)["past_key_values.0.encoder.key"]
        assert len(shown) == len(rows)
    one = engine.select(engine.encode(*pack(SOURCES[:1])), np.zeros(4, np.int64))
    assert held(one) == 1
    # Two states of one source are rows of it, wherever they come from.
    assert held(engine.join([one, engine.copy(one)])) == 1
    assert held(engine.join([one, engine.encode(*pack(SOURCES[1:2]))])) == 5


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_move_say_the_same(engines: tuple[Any, Any], seed: int) -> None:
    draw = np.random.default_rng(seed)
    states = [engine.encode(*pack(SOURCES)) for engine in engines]
    for _ in range(8):
        rows = len(states[0].lengths)
        match draw.integers(4):
            case 0:
                chosen = np.repeat(np.arange(rows), draw.integers(1, 4))[:12]
            case 1:
                chosen = draw.integers(0, rows, draw.integers(1, 7))
            case 2:
                chosen = draw.permutation(rows)
            case _:
                chosen = np.arange(rows)
        states = [engine.select(one, chosen) for engine, one in zip(engines, states, strict=True)]
        ids = draw.integers(3, 90, (len(chosen), draw.integers(1, 3)))
        lengths = np.full(len(ids), ids.shape[1])
        results = [engine.forward(ids, lengths, one) for engine, one in zip(engines, states, strict=True)]
        np.testing.assert_allclose(results[0][0], results[1][0], atol=5e-5)
        states = [state for _, state in results]
        copies = [engine.copy(one) for engine, one in zip(engines, states, strict=True)]
        part = draw.integers(0, len(ids), 2)
        more = [engine.select(one, part) for engine, one in zip(engines, copies, strict=True)]
        states = [engine.join([one, two]) for engine, one, two in zip(engines, states, more, strict=True)]
        shown = [engine.encoded(one) for engine, one in zip(engines, states, strict=True)]
        masks = [np.asarray(states[1].tensors["encoder_attention_mask"])]
        for name, value in shown[0].items():
            seen = masks[0][:, None, :, None] != 0
            np.testing.assert_allclose(value * seen, np.asarray(shown[1][name]) * seen, atol=5e-5)


def test_speech_is_shared_without_a_mask(tmp_path: Path) -> None:
    lmopt.Exporter("onnx", target="onnxruntime").export(
        lmopt.Model.from_module(tiny_whisper()), tmp_path / "out"
    )
    graph = onnx.load(str(tmp_path / "out" / "decoder_model.onnx")).graph
    axes = {one.name: one.type.tensor_type.shape.dim[0].dim_param for one in graph.input}
    assert axes["past_key_values.0.encoder.key"] == "source_batch_size"
    assert axes["past_key_values.0.decoder.key"] == "batch_size"
