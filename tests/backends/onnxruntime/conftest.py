"""One tiny Llama in both dialects, written once a session."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmopt.backends.onnxruntime.engine import open_engine
from lmopt.contracts import EngineRequest
from lmopt.testing import models
from lmopt.testing.workshop import export
from lmopt.types import ModelFacts

FACTS = ModelFacts(vocab_size=models.VOCAB_SIZE, context_length=models.CONTEXT_LENGTH)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnxruntime")
    return {
        dialect: export(llama(), "onnx", FACTS, folder / dialect, dialect=dialect)
        for dialect in ("portable", "onnxruntime")
    }


def llama():
    """A Llama whose heads are as wide as ONNX Runtime's own rotary embedding wants them: 16."""
    config = LlamaConfig(
        vocab_size=models.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=models.CONTEXT_LENGTH,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LlamaForCausalLM(config).eval().requires_grad_(False)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return module


@pytest.fixture
def opened(artifacts):
    """Open engines that are closed when the test ends."""
    engines = []

    def open_one(dialect="onnxruntime", *, threads=1, context_length=models.CONTEXT_LENGTH, **options):
        request = EngineRequest(
            facts=replace(FACTS, context_length=context_length),
            artifact=artifacts[dialect],
            threads=threads,
            options=options,
        )
        engines.append(open_engine(request))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()
