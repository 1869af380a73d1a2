"""Embeddings that multiply what they look up, and those that an encoder and a decoder share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import lmopt
from lmopt.backends.torch.quantized import QuantizedEmbedding, quantized_parts
from lmopt.backends.torch.quantizing import is_embedding, stored_bytes
from lmopt.compression import Quantize
from lmopt.testing.seq2seq import tiny_bart, tiny_t5


def gemma() -> torch.nn.Module:
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma3ForCausalLM(config).eval()


def test_only_embeddings_that_are_known_count() -> None:
    class Own(torch.nn.Embedding):
        pass

    assert is_embedding(torch.nn.Embedding(3, 2))
    assert is_embedding(gemma().get_input_embeddings())
    assert not is_embedding(Own(3, 2))
    assert not is_embedding(torch.nn.Linear(3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_looked_up_is_multiplied(dtype: torch.dtype) -> None:
    """Bit by bit as the float module does with the weight that the codes stand for, in the type it is moved to."""
    model = lmopt.Model.from_module(gemma())
    small = lmopt.Compressor([Quantize(bits=8, group_size=8, embedding=8, head=8)]).compress(model)
    part = small.module.get_input_embeddings()
    assert isinstance(part, QuantizedEmbedding)
    whole = gemma().get_input_embeddings()
    with torch.no_grad():
        whole.weight.copy_(part.weight)
    ids = torch.arange(97)[None]
    assert torch.equal(part.to(dtype)(ids), whole.to(dtype)(ids))


def test_gemma_in_eight_bits_goes_everywhere(tmp_path: Path) -> None:
    model = lmopt.Model.from_module(gemma())
    small = lmopt.Compressor([Quantize(bits=8, group_size=16, embedding=8, head=8)]).compress(model)
    assert small.report.difference.kl_mean < 1e-3
    assert stored_bytes(small.module) < 0.4 * stored_bytes(model.module)
    small.save_pretrained(tmp_path / "saved")
    again = lmopt.Model.from_pretrained(tmp_path / "saved")
    ids = [[5, 6, 7, 8]]
    with lmopt.Runtime(small) as first, lmopt.Runtime(again) as second:
        expected = first.logits(ids)[0]
        assert np.array_equal(second.logits(ids)[0], expected)
    for target in ("portable", "onnxruntime"):
        lmopt.Exporter("onnx", target=target).export(small, tmp_path / target)
        with lmopt.Runtime(tmp_path / target) as runtime:
            np.testing.assert_allclose(runtime.logits(ids)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [pytest.param(tiny_bart, marks=pytest.mark.sweep), tiny_t5])
def test_what_encoder_and_decoder_share_is_quantized_once(make, tmp_path: Path) -> None:
    model = lmopt.Model.from_module(make())
    small = lmopt.Compressor([Quantize(bits=8, group_size=16, embedding=8, head=8)]).compress(model)
    parts = quantized_parts(small.module)
    tables = {path: part for path, part in parts.items() if isinstance(part, QuantizedEmbedding)}
    used = {path for path, part in model.module.named_modules() if is_embedding(part) and "embed_tok" in path}
    assert used <= tables.keys() | {"shared"}
    assert len({part.codes.data_ptr() for part in tables.values()}) == 1
    # No float copy of it is left.
    vocabulary = model.facts.source.size
    floats = [one for one in small.module.parameters() if one.shape[:1] == (vocabulary,) and one.dim() == 2]
    assert not floats
    lmopt.Exporter("onnx", target="onnxruntime").export(small, tmp_path / "out")
    sources = [[5, 6, 7], [8, 9]]
    with lmopt.Runtime(small) as eager, lmopt.Runtime(tmp_path / "out") as exported:
        said = [[one.token_ids for one in rt.generate(sources, max_new_tokens=6)] for rt in (eager, exported)]
    assert said[0] == said[1]
