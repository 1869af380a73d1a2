"""Half precision where it is enough: what stays in float32, and that the result runs, saves and exports."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lmopt
from lmopt import Compressor
from lmopt.backends.torch.casting import apply_casts, cast
from lmopt.backends.torch.language_model import dtype_name, stated_casts
from lmopt.compression import Cast
from lmopt.compression.step import Setting
from lmopt.errors import CorruptArtifactError, InputError, UnsupportedOptionError
from lmopt.testing.models import tiny_gpt, tiny_llama, tiny_lstm

MLP = "model.layers.0.mlp"


def loud_llama() -> nn.Module:
    """Its first MLP multiplies two numbers of 30,000 and makes of them what others can live with."""
    module = tiny_llama()
    mlp = module.get_submodule(MLP)
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.mul_(3e3)
        mlp.down_proj.weight.mul_(1 / 9e6)
    return module


def setting(module: nn.Module, count: int = 2) -> Setting:
    vocabulary = module.config.vocab_size if hasattr(module, "config") else 128
    random = np.random.default_rng(0)
    return Setting(vocabulary, [random.integers(0, vocabulary, 32) for _ in range(count)])


def logits(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return module(ids).logits.float()


IDS = torch.arange(3, 43)[None]


def test_what_overflows_between_modules_keeps_the_module_around_it_in_float32() -> None:
    module = loud_llama()
    small = cast(module, Cast(), setting(module))
    assert stated_casts(small) == {"dtype": "float16", "float32": {MLP: False}}
    types = {name: one.dtype for name, one in small.named_parameters()}
    assert {one for name, one in types.items() if name.startswith(MLP)} == {torch.float32}
    assert {one for name, one in types.items() if not name.startswith(MLP)} == {torch.float16}
    expected = logits(module, IDS)
    assert (logits(small, IDS) - expected).abs().max() < 0.02 * expected.abs().max()
    assert {one.dtype for one in module.parameters()} == {torch.float32}
    # Without the exception there is nothing left of it.
    assert not logits(loud_llama().half(), IDS).isfinite().all()


def test_a_stream_that_overflows_is_carried_on_in_float32() -> None:
    module = tiny_llama()
    with torch.no_grad():
        module.get_submodule(MLP).down_proj.weight.mul_(3e6)
    small = cast(module, Cast(), setting(module))
    # The first block gives more than the type holds, so it and all that read it whole stay.
    assert stated_casts(small)["float32"]["model.layers.0"] is True
    expected = logits(module, IDS)
    assert (logits(small, IDS) - expected).abs().max() < 0.02 * expected.abs().max()


def test_without_texts_weights_alone_decide() -> None:
    module = tiny_llama()
    with torch.no_grad():
        module.get_submodule(MLP).up_proj.weight[0, 0] = 1e5
        module.get_submodule("model.layers.1.mlp").up_proj.weight.mul_(1e-6)
    small = cast(module, Cast(keep=["model.norm"]), Setting(module.config.vocab_size))
    kept = stated_casts(small)["float32"]
    assert set(kept) == {f"{MLP}.up_proj", "model.layers.1.mlp.up_proj", "model.norm"}
    assert small.get_submodule(MLP).up_proj.weight.dtype == torch.float32
    assert small.get_submodule(MLP).gate_proj.weight.dtype == torch.float16
    assert set(stated_casts(cast(module, Cast("bfloat16"), setting(module)))["float32"]) == set()


def test_tied_weights_stay_tied_in_one_type() -> None:
    module = tiny_llama()
    module.lm_head.weight = module.model.embed_tokens.weight
    small = cast(module, Cast(keep=["lm_head"]), setting(module))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.lm_head.weight.dtype == torch.float32
    assert dtype_name(small) == "float16"
    assert torch.allclose(logits(small, IDS), logits(module, IDS), atol=5e-2)


def test_what_cannot_be_cast_is_refused() -> None:
    module = tiny_llama()
    with pytest.raises(UnsupportedOptionError, match=r"near: .*mlp"):
        cast(module, Cast(keep=["model.layers.0.mpl"]), setting(module))
    with pytest.raises(UnsupportedOptionError, match="in float32"):
        cast(tiny_llama().half(), Cast(), setting(module))
    with pytest.raises(UnsupportedOptionError, match=r"holds (casts|torch\.float16)"):
        cast(cast(module, Cast(), setting(module)), Cast(), setting(module))
    with torch.no_grad():
        module.get_submodule(MLP).up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        cast(module, Cast(), setting(module))
    for wrong in ({"dtype": "float8"}, {"keep": "model"}, {"headroom": 0.5}):
        with pytest.raises(UnsupportedOptionError):
            Cast(**wrong)
    with pytest.raises(CorruptArtifactError, match="lmopt_casts"):
        apply_casts(tiny_llama(), {"dtype": "float16", "float32": {"nowhere": False}}, "x")


def test_a_recipe_casts_saves_and_loads(tmp_path: Path) -> None:
    model = lmopt.Model.from_module(loud_llama())
    small = Compressor([Cast()]).compress(
        model, calibration=lmopt.compression.Calibration(None, rows=2, row_tokens=32)
    )
    assert small.report is not None
    assert small.report.difference.kl_mean < 1e-4
    assert small.report.bytes < 0.75 * small.report.float_bytes
    small.save_pretrained(tmp_path / "out")
    again = lmopt.Model.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again.module, IDS), logits(small.module, IDS))
    assert again.fingerprint() == small.fingerprint()
    whole = lmopt.Model.from_pretrained(tmp_path / "out", dtype="float32")
    assert {one.dtype for one in whole.module.parameters()} == {torch.float32}
    assert not stated_casts(whole.module)
    with lmopt.Runtime(small, backend="torch") as runtime:
        assert runtime.engine.report().dtype == "float16"
        ids = IDS[0].numpy()
        np.testing.assert_allclose(
            np.asarray(runtime.logits(ids[None]))[0], logits(small.module, IDS)[0], rtol=1e-2, atol=2e-2
        )


@pytest.mark.parametrize("build", [tiny_gpt, tiny_lstm])
def test_modules_of_ones_own_save_their_types(build, tmp_path: Path) -> None:
    model = lmopt.Model.from_module(build())
    module = cast(model.module, Cast(), Setting(model.facts.vocab_size))
    small = model.with_module(module)
    small.save_pretrained(tmp_path / "out")
    fresh = lmopt.Model.from_module(build(seed=1))
    fresh.load_weights(tmp_path / "out")
    ids = IDS % model.facts.vocab_size
    with torch.inference_mode():
        first, again, exact = (one(ids)[0] for one in (module, fresh.module, model.module))
    assert torch.equal(first, again)
    assert first.dtype == torch.float16
    torch.testing.assert_close(first.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_a_graph_casts_where_types_meet(target: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx_ir")
    module = loud_llama()
    model = lmopt.Model.from_module(module)
    small = model.with_module(cast(module, Cast(), setting(module)))
    artifact = lmopt.Exporter("onnx", target=target).export(small, tmp_path / "out")
    written = artifact.manifest["formats"]["onnx"]
    assert written["dtype"] == "float16"
    assert "Cast" in written["operators"]
    assert written["target"] == "portable"
    if target == "onnxruntime":
        assert "float16 and float32" in written["fallback"]
    import onnx

    graph = onnx.load(artifact.file("model.onnx")).graph
    types = {one.data_type for one in graph.initializer if len(one.dims) == 2}
    assert {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16} <= types
    assert artifact.manifest["parity"]["onnx"]["tolerance"]["name"] == "float16"
