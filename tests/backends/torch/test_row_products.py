"""Products in 8 bits with a scale for each output and each token."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmopt
from lmopt.backends.torch import row_products
from lmopt.backends.torch.row_products import round_blocks, round_columns
from lmopt.compression import Quantize
from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.testing.seq2seq import tiny_bart, tiny_t5

POSITIONS = tiny_bart().model.encoder.embed_positions.num_embeddings
SOURCES = [[5, 6, 7, 8, 9, 10, 11], [40, 41, 42]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 20))
def test_a_column_is_rounded_by_its_largest_weight(seed: int, inputs: int, outputs: int) -> None:
    draw = np.random.default_rng(seed)
    matrix = (draw.standard_normal((inputs, outputs)) * draw.lognormal(size=outputs)).astype(np.float32)
    matrix[:, 0] = 0
    codes, scales = round_columns(matrix)
    assert codes.dtype == np.int8
    assert np.abs(codes.astype(int)).max(initial=0) <= 127
    assert (scales > 0).all()
    assert (np.abs(codes * scales - matrix) <= 0.5001 * scales).all()
    assert not codes[:, 0].any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([16, 32, 64]), st.integers(1, 20))
def test_a_block_is_rounded_by_its_largest_weight(seed: int, blocks: int, block: int, outputs: int) -> None:
    draw = np.random.default_rng(seed)
    matrix = (draw.standard_normal((blocks * block, outputs)) * draw.lognormal(size=outputs)).astype(
        np.float32
    )
    matrix[:block, 0] = 0
    codes, scales = round_blocks(matrix, block)
    assert (codes.dtype, codes.shape, scales.shape) == (np.uint8, (outputs, blocks, block), (outputs, blocks))
    assert (codes >= 1).all()
    assert (scales > 0).all()
    restored = ((codes.astype(np.float32) - 128) * scales[..., None]).reshape(outputs, -1).T
    assert (np.abs(restored - matrix) <= 0.5001 * np.repeat(scales, block, axis=1).T).all()
    assert (codes[0, 0] == 128).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("rows") / "out"
    exporter = lmopt.Exporter("onnx", target="onnxruntime", products="int8")
    exporter.export(lmopt.Model.from_module(tiny_bart()), target)
    return target


def test_every_product_and_the_table_are_in_eight_bits(folder: Path) -> None:
    record = lmopt.Artifact.open(folder).manifest["formats"]["onnx"]
    assert (record["target"], record["products"]) == ("onnxruntime", "int8")
    counts = []
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        graph = onnx.load(str(folder / name)).graph
        kinds = Counter(node.op_type for node in graph.node)
        counts.append((kinds["MatMulIntegerToFloat"], kinds["MatMulNBits"]))
        assert not [node for node in graph.node if node.op_type in ("MatMul", "FusedMatMul")]
        floats = {one.name: one for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
        read = {name for node in graph.node for name in node.input}
        # Of matrices, positions alone are in float; what nothing reads is gone.
        matrices = [one for one in floats.values() if len(one.dims) == 2 and min(one.dims) > 1]
        assert [one.dims[0] for one in matrices] == [POSITIONS]
        assert set(floats) <= read
    assert sum(map(sum, counts)) == record["quantized_products"]
    # Layers of the encoder have 6 products and the decoder's keys and values of the source 2; the decoder's 8, and
    # the head. What reads a token at a time multiplies by small matrices in one operator.
    assert counts == [(2 * 6 + 2 * 2, 0), (0, 2 * 8 + 1)]


def test_products_of_one_value_share_its_rounding(folder: Path) -> None:
    graph = onnx.load(str(folder / "encoder_model.onnx")).graph
    rounded = [node.input[0] for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(set(rounded)) == sum(node.op_type == "QuantizeLinear" for node in graph.node)
    # Query, key and value of each layer's own attention; and keys and values of two layers of the decoder.
    assert sorted(rounded.count(one) for one in set(rounded) if rounded.count(one) > 1) == [3, 3, 4]


def test_large_matrices_of_a_decoder_keep_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_products, "_SMALL", 0)
    exporter = lmopt.Exporter("onnx", target="onnxruntime", products="int8")
    exporter.export(lmopt.Model.from_module(tiny_bart()), tmp_path / "out")
    graph = onnx.load(str(tmp_path / "out" / "decoder_model.onnx")).graph
    rounded = [node.input[0] for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(rounded) == 2 * 8 + 1
    assert len(set(rounded)) == sum(node.op_type == "QuantizeLinear" for node in graph.node)
    # Query, key and value of each layer's own attention.
    assert max(rounded.count(one) for one in rounded) == 3


def test_rows_do_not_depend_on_their_neighbours(folder: Path) -> None:
    with lmopt.Runtime(folder) as runtime:
        together = runtime.logits([[2, 5, 6], [2, 7, 8]], sources=[SOURCES[0], SOURCES[0][::-1]])
        alone = runtime.logits([2, 5, 6], sources=SOURCES[0])
        np.testing.assert_allclose(together[0], alone, atol=2e-5, rtol=2e-5)
        found = [one.token_ids for one in runtime.generate(SOURCES, max_new_tokens=8, num_beams=3)]
        assert found == [runtime.generate(one, max_new_tokens=8, num_beams=3).token_ids for one in SOURCES]


@pytest.mark.parametrize(
    ("make", "target", "products", "said"),
    [
        (tiny_bart, "portable", "int8", "for target='onnxruntime'"),
        (tiny_bart, "onnxruntime", "fp8", "expected one of auto, int8, int8-encoder"),
        (tiny_bart, "onnxruntime", "int4", "expected one of"),
        (lambda: tiny_t5().half(), "onnxruntime", "int8", "float16"),
    ],
)
def test_what_cannot_be_written_is_refused(
    make: Any, target: str, products: str, said: str, tmp_path: Path
) -> None:
    exporter = lmopt.Exporter("onnx", target=target, products=products)
    with pytest.raises((UnsupportedOptionError, UnsupportedError), match=said):
        exporter.export(lmopt.Model.from_module(make()), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_encoder_alone(tmp_path: Path) -> None:
    """Speech suffers from a rounded decoder: its own weights may be in groups beside an encoder in rows."""
    step = Quantize(bits=8, group_size=16, embedding=8, head=8, overrides={"model.encoder.layers.*": None})
    small = lmopt.Compressor([step]).compress(lmopt.Model.from_module(tiny_bart()), sources=SOURCES)
    exporter = lmopt.Exporter("onnx", target="onnxruntime", products="int8-encoder", accuracy_level=4)
    record = exporter.export(small, tmp_path / "out").manifest["formats"]["onnx"]
    assert (record["products"], record["quantized_products"]) == ("int8-encoder", 2 * 6)
    graphs = [
        onnx.load(str(tmp_path / "out" / f"{part}_model.onnx")).graph for part in ("encoder", "decoder")
    ]
    kinds = [{node.op_type for node in graph.node} for graph in graphs]
    assert {"MatMulIntegerToFloat", "MatMulNBits"} <= kinds[0]
    assert "MatMulIntegerToFloat" not in kinds[1]
    assert "MatMulNBits" in kinds[1]
