"""The table of types and targets, held against the real compiler in both directions; no GPU is needed."""

import numpy as np
import pytest
import torch

from lmopt.backends.tensorrt import precision
from lmopt.backends.tensorrt.building import BuildOptions, check_network, compile_network, open_network
from lmopt.backends.tensorrt.engine_cache import graph_of
from lmopt.backends.tensorrt.flavour import load
from lmopt.backends.torch.export_onnx import export_onnx
from lmopt.contracts import ExportRequest
from lmopt.errors import EngineBuildError, UnsupportedPrecisionError
from lmopt.testing import models
from lmopt.types import ModelFacts

FACTS = ModelFacts(models.VOCAB_SIZE, models.CONTEXT_LENGTH)
ALL = ("7.5", "8.6", "8.9", "12.0")
SOME = ("7.5", "8.9")
CASES = [
    ("llama", "float16", ALL),
    ("llama", "float16+int4", ALL),
    ("lstm", "float32", ALL),
    ("lstm", "bfloat16", ALL),
    ("lstm", "float32+int8", SOME),
    ("gpt", "float16", SOME),
    ("wide", "float16+int4-128", SOME),  # two groups of 128 a row
    ("wide", "float16+int8-rounded", SOME),  # activations in 8 bits, by plain operators
]
SWEEP = [
    ("llama", "float32", ALL),
    ("llama", "bfloat16", ALL),
    ("llama", "float16+int8", ALL),
    ("lstm", "float16", ALL),
    ("lstm", "float32+int4", ALL),
    ("gpt", "float32+int8", SOME),
    ("gpt", "float16+int4-asymmetric", SOME),
    ("gpt_neox", "float16", SOME),
    ("qwen3", "float16", SOME),
    ("gemma2", "float16", SOME),
    ("phi3", "bfloat16", SOME),
]


def named(cases, *marks):
    return [pytest.param(*one, id=f"{one[0]}-{one[1]}", marks=marks) for one in cases]


@pytest.mark.parametrize(("family", "chosen", "targets"), [*named(CASES), *named(SWEEP, pytest.mark.slow)])
def test_the_table_says_what_the_compiler_does(family, chosen, targets, exported, monkeypatch):
    artifact = exported(family, chosen)
    with open_network(graph_of(artifact), "tensorrt_rtx") as (network, prepared):
        types = precision.types_in_use(network)
        for part in chosen.split("+"):
            assert part.partition("-")[0] in types
        for target in targets:
            options = BuildOptions(compute_capabilities=(target,), max_batch=2, max_sequence=16)
            if types <= precision.CAN[target]:
                plan = compile_network(network, prepared, options, facts=artifact.facts)
                assert len(plan.data) > 10_000
                assert plan.targets == (target,)
                assert [one.name for one in plan.profiles] == ["prefill", "decode"]
                assert plan.compute_type == chosen.partition("+")[0]
                continue
            with pytest.raises(UnsupportedPrecisionError, match=target.replace(".", r"\.")):
                check_network(network, prepared, options)
            with monkeypatch.context() as patch:
                # Without the table the compiler must refuse by itself, or the table is too strict.
                patch.setattr(precision, "CAN", {})
                with pytest.raises(EngineBuildError, match="Cannot compile"):
                    compile_network(network, prepared, options, facts=artifact.facts)


@pytest.mark.parametrize(("kind", "cannot", "can"), [("int8", "", "7.5"), ("fp8", "8.6", "8.9")])
def test_eight_bit_products_of_the_exporter(kind, cannot, can, make, tmp_path):
    module = make("llama", "float16")
    rows = (np.arange(3, 40),)
    request = ExportRequest(module, tmp_path, FACTS, "portable", {"products": kind}, {}, rows)
    with torch.no_grad():
        count = export_onnx(request)["quantized_products"]
    with open_network(tmp_path / "model.onnx", "tensorrt_rtx") as (network, prepared):
        assert prepared.weights == {kind: count}
        assert network.types()[kind] > count  # and activations, which several products share
        if cannot:
            with pytest.raises(UnsupportedPrecisionError, match=r"8\.6 does not compute in fp8"):
                check_network(network, prepared, BuildOptions(compute_capabilities=(cannot,)))
        options = BuildOptions(compute_capabilities=(can,), max_batch=2, max_sequence=16)
        assert compile_network(network, prepared, options, facts=FACTS).types[kind] > count


def test_the_table_knows_every_target_of_the_installed_rtx():
    assert set(precision.CAN) == set(load("tensorrt_rtx").targets)


def test_several_targets_go_into_one_plan(exported):
    artifact = exported("lstm", "float32")
    with open_network(graph_of(artifact), "tensorrt_rtx") as (network, prepared):
        options = BuildOptions(compute_capabilities=("8.6", "8.9", "12.0"))
        assert compile_network(network, prepared, options, facts=artifact.facts).targets == (
            "8.6",
            "8.9",
            "12.0",
        )
        bad = BuildOptions(compute_capabilities=("8.6", "7.5"))
        with pytest.raises(UnsupportedPrecisionError, match=r"7\.5 does not compute in float32"):
            compile_network(network, prepared, bad, facts=artifact.facts)


def test_types_are_read_back_and_a_changed_one_is_an_error(exported):
    artifact = exported("llama", "float16+int4")
    with open_network(graph_of(artifact), "tensorrt_rtx") as (network, prepared):
        types = precision.require_met(network, prepared)
        assert types["int4"] == prepared.weights["int4"] > 10
        prepared.weights["int4"] += 10_000
        with pytest.raises(EngineBuildError, match="weights are in int4"):
            precision.require_met(network, prepared)


def test_an_error_says_where_it_would_build_and_how_to_get_there():
    with pytest.raises(UnsupportedPrecisionError) as caught:
        precision.require({"fp8", "float16"}, ["8.6", "8.9"])
    assert "8.6 does not compute in fp8" in str(caught.value)
    assert "8.9, 12.0, 12.1" in str(caught.value)
    precision.require({"fp8"}, ["9.0"])  # not in the table: the builder is the judge
