"""Tables of cosines and sines that a graph makes by itself are those that the model has."""

import numpy as np
import onnx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmopt import Exporter, Model, Runtime
from lmopt.backends.torch.fused.tables import frequencies_of

POSITIONS = 8192


def tables(
    frequencies: torch.Tensor, scale: float = 1.0, positions: int = POSITIONS
) -> tuple[np.ndarray, np.ndarray]:
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies[None]
    return (angles.cos() * scale).numpy(), (angles.sin() * scale).numpy()


def inverse(base: float, columns: int) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, 2 * columns, 2, dtype=torch.float32) / (2 * columns))


@pytest.mark.parametrize("base", [1e4, 1e5, 5e5, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1.2079441541679836])
@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_frequencies_are_found_to_the_bit(base: float, scale: float, factor: float) -> None:
    frequencies = inverse(base, 32) * factor
    found = frequencies_of(*tables(frequencies, scale))
    assert found is not None
    # A frequency that turns by less than rounding over all positions may be a neighbour.
    told_apart = frequencies.numpy() * POSITIONS > 1
    np.testing.assert_array_equal(found[0][told_apart], frequencies.numpy()[told_apart])
    assert found[1] == np.float32(scale)


def test_a_table_that_is_none_of_frequencies_is_left_alone() -> None:
    cos, sin = tables(inverse(1e4, 32))
    other = cos.copy()
    other[5000] = cos[5001]
    assert frequencies_of(other, sin) is None
    assert frequencies_of(cos, cos) is None
    assert frequencies_of(cos.astype(np.float16), sin.astype(np.float16)) is None
    squared = torch.arange(POSITIONS, dtype=torch.float32)[:, None] ** 1.01 * inverse(1e4, 32)[None]
    assert frequencies_of(squared.cos().numpy(), squared.sin().numpy()) is None
    assert frequencies_of(cos[:1], sin[:1]) is None


def test_a_graph_holds_frequencies_and_gives_the_same_logits(tmp_path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
    )
    torch.manual_seed(0)
    model = Model.from_module(LlamaForCausalLM(config).eval())
    artifact = Exporter("onnx", target="onnxruntime").export(model, tmp_path / "out")
    graph = onnx.load(str(artifact.file("model.onnx")), load_external_data=False).graph
    assert max(np.prod(one.dims) for one in graph.initializer) < 8 * POSITIONS
    assert [node.op_type for node in graph.node if node.op_type in ("Cos", "Sin")] == ["Cos", "Sin"]
    ids = np.random.default_rng(0).integers(0, 64, 300).tolist()
    with Runtime(artifact, backend="onnxruntime") as exported, Runtime(model, backend="torch") as eager:
        np.testing.assert_allclose(exported.logits(ids), eager.logits(ids), atol=1e-5, rtol=1e-5)
