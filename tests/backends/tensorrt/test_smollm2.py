"""SmolLM2, full size, through the real RTX compiler: both profiles, three generations of GPUs, no GPU."""

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
TARGETS = [TOGETHER, *(pytest.param((one,), marks=pytest.mark.slow) for one in TOGETHER)]
CASES = {
    "float16": (None, 250e6, 320e6),
    "int8": (Quantize(8, 64), 140e6, 190e6),
    "int4": (Quantize(4, 32), 90e6, 140e6),
}


@pytest.fixture(scope="session")
def artifact_of(smollm2, keep):
    """Export SmolLM2 with such weights, once."""

    def one(kind: str):
        step = CASES[kind][0]
        model = lmopt.Model.from_pretrained(smollm2, dtype="float16")
        module = (
            model.module if step is None else by_matrix(model.module, step, Setting(model.facts.vocab_size))
        )
        with torch.no_grad():
            return keep(module, "onnx", model.facts, Path(f"smollm2-{kind}"))

    return one


@pytest.mark.real_model
@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize(
    # Exports and builds take minutes: a normal run makes the one that has most in it.
    "kind",
    [pytest.param(one, marks=() if one == "int4" else pytest.mark.slow) for one in CASES],
)
def test_smollm2_compiles_for_three_generations(kind, targets, artifact_of):
    _, least, most = CASES[kind]
    artifact = artifact_of(kind)
    options = BuildOptions("tensorrt_rtx", targets)
    plan = build_plan(graph_of(artifact), options, facts=artifact.facts)
    assert plan.targets == targets
    prefill, decode = plan.profiles
    assert prefill.covers(4, 512, 0)
    assert prefill.covers(1, 100, 4000)
    assert decode.covers(4, 1, 4096)
    assert not decode.covers(1, 2, 0)
    assert plan.compute_type == "float16"
    # The weights are in the plan as the graph has them: packed.
    assert least < len(plan.data) < most
    if kind != "float16":
        assert plan.types[kind] >= 210
    assert {one.dtype for one in plan.inputs} == {"int64", "float16"}
