"""Linears that multiply in 8 bits: what is written is what was measured, and the standard's own runtime computes it."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import lmopt
from lmopt.backends.torch.compressing import by_matrix
from lmopt.backends.torch.export_onnx import export_onnx
from lmopt.compression import Quantize
from lmopt.compression.step import Setting
from lmopt.contracts import ExportRequest
from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.testing.models import CONTEXT_LENGTH, VOCAB_SIZE, tiny_gpt, tiny_llama, tiny_lstm
from lmopt.types import ModelFacts

FACTS = ModelFacts(VOCAB_SIZE, CONTEXT_LENGTH)
ROWS = (np.arange(3, 60),)
MOST = {"int8": 127, "fp8": 448}


def export(module, folder: Path, products: str, target: str = "portable"):
    request = ExportRequest(module, folder, FACTS, target, {"products": products}, {}, ROWS)
    with torch.no_grad():
        return export_onnx(request)


@pytest.mark.parametrize(
    ("make", "kind", "dtype"),
    [(tiny_llama, "int8", "float16"), (tiny_llama, "fp8", "float32"), (tiny_gpt, "int8", "float32")],
)
def test_weights_and_activations_are_in_eight_bits(make, kind, dtype, tmp_path):
    module = make().to(getattr(torch, dtype))
    linears = [one for one in module.modules() if isinstance(one, torch.nn.Linear)]
    record = export(module, tmp_path, kind)
    seen = {}
    for one in linears:
        one.register_forward_pre_hook(lambda part, args: seen.setdefault(part, []).append(args[0]))
    random = np.random.default_rng(0).integers(0, VOCAB_SIZE, 256)[:CONTEXT_LENGTH]
    with torch.no_grad():
        for row in (*ROWS, random):
            module(torch.from_numpy(row)[None])
    # All but the one that makes the logits.
    assert record["quantized_products"] == len(linears) - 1
    assert record["products"] == kind
    graph = ir.load(tmp_path / "model.onnx").graph
    weights = {node.outputs[0] for node in graph if node.op_type == "DequantizeLinear"}
    products = [node for node in graph if node.op_type == "MatMul" and node.inputs[1] in weights]
    assert len(products) == len(linears) - 1
    numbers = {one: one.weight.detach().float().t().numpy() for one in linears}
    for node in products:
        codes, scales = (one.const_value.numpy() for one in node.inputs[1].producer().inputs[:2])
        values = codes.astype(np.float32) * scales.astype(np.float32)
        (part,) = [
            one for one, weight in numbers.items()
            if weight.shape == values.shape and np.abs(weight - values).max() < 0.07 * np.abs(weight).max()
        ]  # fmt: skip
        scale = float(node.inputs[0].producer().inputs[1].const_value.numpy())
        largest = max(float(one.abs().max()) for one in seen[part])
        assert scale * MOST[kind] == pytest.approx(largest, rel=5e-3)


def test_a_published_export_names_them_and_keeps_their_limits(tmp_path):
    artifact = lmopt.Exporter("onnx", products="fp8").export(
        lmopt.Model.from_module(tiny_llama(), context_length=CONTEXT_LENGTH), tmp_path / "out"
    )
    assert artifact.manifest["formats"]["onnx"]["products"] == "fp8"
    report = artifact.manifest["parity"]["onnx"]
    assert report["tolerance"]["name"] == "fp8-products"
    # It is not the float model that ran.
    assert report["cases"]["prefill"]["kl_mean"] > 1e-6


def test_what_multiplies_in_no_linear_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="no linear with weights in float"):
        export(tiny_lstm(), tmp_path, "int8")
    with pytest.raises(UnsupportedError, match="those of a compressed model keep their own form"):
        export(by_matrix(tiny_llama(), Quantize(8, 32), Setting(VOCAB_SIZE)), tmp_path, "int8")


@pytest.mark.parametrize(
    ("products", "target", "said"),
    [
        ("int4", "portable", "expected one of auto, int8, fp8"),
        ("int8", "onnxruntime", "use accuracy_level=4 with quantized weights"),
    ],
)
def test_an_impossible_wish_is_refused(products, target, said, tmp_path):
    with pytest.raises(UnsupportedOptionError, match=said):
        export(tiny_llama(), tmp_path, products, target)
    assert not list(tmp_path.iterdir())
