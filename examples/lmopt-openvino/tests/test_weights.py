"""Quantized weights stay quantized, and stay the same numbers."""

import numpy as np
import pytest

from lmopt import Compressor, Model
from lmopt.compression import HQQ, Quantize
from lmopt.contracts import EngineRequest
from lmopt.errors import UnsupportedOptionError
from lmopt.registry import backends
from lmopt.testing import models
from lmopt.testing.workshop import export, reference_of


@pytest.mark.filterwarnings("ignore::lmopt.compressor.LossWarning")
@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (Quantize(bits=4, group_size=16, symmetric=False), {"u4", "u8"}),
        (Quantize(bits=8, group_size=16, symmetric=True), {"i8"}),
        (HQQ(bits=4, group_size=16), {"u4", "u8"}),  # with float offsets
    ],
    ids=["integer zeros", "symmetric, 8 bits", "float offsets"],
)
def test_weights_are_read_as_codes(tmp_path, step, kept):
    module = models.tiny_llama()
    # Every block has the same products, and most of the test's time goes into writing them.
    module.model.layers, module.config.num_hidden_layers = module.model.layers[:1], 1
    small = Compressor([step]).compress(Model.from_module(module))
    artifact = export(small.module, "onnx", small.facts, tmp_path / "model")
    truth = reference_of(small.module)
    engine = backends.load("openvino")(EngineRequest(facts=small.facts, artifact=artifact, threads=1))
    # Embedding and head have 8 bits unless told otherwise.
    assert engine.report().details["weights"].keys() == kept
    row = np.arange(30) % small.facts.vocab_size
    logits, state = engine.forward(row[None, :29], np.array([29]), engine.begin(1))
    last, _ = engine.forward(row[None, 29:], np.array([1]), state)
    np.testing.assert_allclose(np.concatenate([logits[0], last[0]]), truth(row), atol=2e-5)
    engine.close()
    if isinstance(step, HQQ):  # OpenVINO takes the property, gives it back when asked, and does nothing
        asked = {"dynamic_quantization_group_size": 16}
        with pytest.raises(UnsupportedOptionError, match="no effect on weights with float offsets"):
            backends.load("openvino")(EngineRequest(facts=small.facts, artifact=artifact, options=asked))


def test_rounded_activations_are_refused_where_they_would_have_no_effect(workshop):
    """OpenVINO takes the property, gives it back when asked, and does nothing."""
    llama = workshop.subject("llama", "onnx", "float32")
    asked = {"dynamic_quantization_group_size": 16}
    with pytest.raises(UnsupportedOptionError, match="no effect in bfloat16"):
        backends.load("openvino")(
            EngineRequest(facts=llama.facts, artifact=llama.artifact, dtype="bfloat16", options=asked)
        )
