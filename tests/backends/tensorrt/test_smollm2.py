"""SmolLM2 through the real RTX compiler: full width, both profiles, three generations of GPUs, no GPU.

Its first two layers in a normal run, all thirty with --full-sweep: every layer is the same graph again.
"""

from pathlib import Path

import pytest
import torch

import lmopt
from lmopt.backends.tensorrt.building import BuildOptions, build_plan
from lmopt.backends.tensorrt.engine_cache import graph_of
from lmopt.backends.torch.compressing import by_matrix
from lmopt.compression import Quantize
from lmopt.compression.step import Setting

# One plan for all of them: as large, and as quickly built, as for one.
TOGETHER = ("8.6", "8.9", "12.0")
# Step, and bytes of a weight of the embedding and of any other, scales included.
CASES = {
    "float16": (None, 2.0, 2.0),
    "int8": (Quantize(8, 64), 1 + 4 / 64, 1 + 4 / 64),
    "int4": (Quantize(4, 32), 1 + 4 / 32, 0.5 + 4 / 32),
}
FEW, ALL = 2, 30
SIZES = [
    (FEW, TOGETHER),
    *(
        pytest.param(ALL, targets, marks=pytest.mark.slow)
        for targets in (TOGETHER, *((one,) for one in TOGETHER))
    ),
]


@pytest.fixture(scope="session")
def artifact_of(smollm2, keep):
    """Export the first layers of SmolLM2 with such weights, once."""

    def one(kind: str, layers: int):
        step = CASES[kind][0]
        model = lmopt.Model.from_pretrained(smollm2, dtype="float16")
        model.module.model.layers = model.module.model.layers[:layers]
        model.module.config.num_hidden_layers = layers
        module = (
            model.module if step is None else by_matrix(model.module, step, Setting(model.facts.vocab_size))
        )
        with torch.no_grad():
            return keep(module, "onnx", model.facts, Path(f"smollm2-{kind}-{layers}"))

    return one


@pytest.mark.real_model
@pytest.mark.parametrize(("layers", "targets"), SIZES)
@pytest.mark.parametrize("kind", list(CASES))
def test_smollm2_compiles_for_three_generations(kind, layers, targets, artifact_of):
    _, embedding, other = CASES[kind]
    artifact = artifact_of(kind, layers)
    options = BuildOptions("tensorrt_rtx", targets)
    plan = build_plan(graph_of(artifact), options, facts=artifact.facts)
    assert plan.targets == targets
    prefill, decode = plan.profiles
    assert prefill.covers(4, 512, 0)
    assert prefill.covers(1, 100, 4000)
    assert decode.covers(4, 1, 4096)
    assert not decode.covers(1, 2, 0)
    assert plan.compute_type == "float16"
    # The weights are in the plan as the graph has them: packed, and those of embedding and head once.
    expected = 49152 * 576 * embedding + layers * 3_539_000 * other
    assert 0.95 * expected < len(plan.data) < 1.35 * expected
    if kind != "float16":
        assert plan.types[kind] >= 7 * layers
    assert {one.dtype for one in plan.inputs} == {"int64", "float16"}
