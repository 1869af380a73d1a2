"""bfloat16 artefacts: proved, and run, in float32 with the very same weights."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import lmopt
from lmopt.backends.torch import export_onnx
from lmopt.errors import ParityError, UnsupportedError
from lmopt.evaluation.tolerances import tolerance_for
from lmopt.testing.models import VOCAB_SIZE, tiny_lstm

LIMITS = tolerance_for("float32")


def half_lstm() -> lmopt.Model:
    return lmopt.Model.from_module(tiny_lstm().to(torch.bfloat16))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> lmopt.Artifact:
    return lmopt.Exporter("onnx").export(half_lstm(), tmp_path_factory.mktemp("bfloat16") / "out")


def test_the_gate_says_what_it_compared(artifact):
    assert artifact.manifest["formats"]["onnx"]["dtype"] == "bfloat16"
    report = artifact.manifest["parity"]["onnx"]
    assert report["candidate"] == "onnxruntime cpu float32"
    assert report["tolerance"]["name"] == "bfloat16"
    weights = ir.load(artifact.file("model.onnx")).graph.initializers.values()
    assert ir.DataType.FLOAT not in {one.dtype for one in weights if one.shape and len(one.shape) > 1}


def test_widened_it_computes_what_the_module_does_in_float32(artifact):
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, 20)
    with torch.no_grad():
        wanted = half_lstm().module.float()(torch.from_numpy(ids)[None])[0][0].numpy()
    with lmopt.Runtime(artifact, backend="onnxruntime", widen=True) as runtime:
        found = runtime.logits([ids])[0]
        assert runtime.report().actual.dtype == "float32"
    np.testing.assert_allclose(found, wanted, atol=LIMITS.atol, rtol=LIMITS.rtol)


def test_nothing_is_widened_unasked(artifact):
    with pytest.raises(UnsupportedError, match=r"bfloat16.*widen=True"):
        lmopt.Runtime(artifact, backend="onnxruntime")


def test_what_is_no_bfloat16_is_not_widened(tmp_path: Path):
    folder = lmopt.Exporter("onnx").export(lmopt.Model.from_module(tiny_lstm()), tmp_path / "out").path
    with pytest.raises(UnsupportedError, match="in float32"):
        lmopt.Runtime(folder, backend="onnxruntime", widen=True)


def test_a_wrong_weight_does_not_pass_the_gate(tmp_path: Path, monkeypatch):
    tidy = export_onnx.tidy

    def break_one(model: ir.Model) -> None:
        tidy(model)
        weight = next(one for one in model.graph.initializers.values() if one.dtype == ir.DataType.BFLOAT16)
        weight.const_value = ir.tensor(-weight.const_value.numpy(), name=weight.name)

    monkeypatch.setattr(export_onnx, "tidy", break_one)
    with pytest.raises(ParityError, match="does not compute"):
        lmopt.Exporter("onnx").export(half_lstm(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dialect_of_an_engine_without_the_type_is_refused(tmp_path: Path):
    with pytest.raises(UnsupportedError, match=r"bfloat16.*dtype='float32'"):
        lmopt.Exporter("onnx", target="onnxruntime").export(half_lstm(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
