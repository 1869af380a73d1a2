"""Keys and values in 8 bits: eager by token and head, ONNX Runtime by channel, and who has none."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lmopt
from lmopt.backends.torch.int8_cache import Int8Layer
from lmopt.contracts import EngineRequest
from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.evaluation.divergence import DifferenceMeter
from lmopt.registry import backends
from lmopt.testing.models import tiny_gpt, tiny_llama, tiny_lstm

IDS = np.random.default_rng(3).integers(0, 128, (3, 24))


def engine(model: lmopt.Model, **options: object):
    request = EngineRequest(facts=model.facts, module=model.module, options=options)
    return backends.load("torch")(request)


def distance(expected: np.ndarray, found: np.ndarray) -> float:
    meter = DifferenceMeter()
    meter.update(expected, found)
    return meter.result().kl_mean


def test_a_layer_gives_back_what_it_was_given_but_for_rounding() -> None:
    made = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 7, 8, generator=made) for _ in range(2))
    keys[0, 0, 2] = 0
    empty, none = torch.zeros(2, 3, 0, 8, dtype=torch.int8), torch.zeros(2, 3, 0, 1)
    layer = Int8Layer(empty, none, empty, none)
    layer.update(keys[:, :, :5], values[:, :, :5])
    found_keys, found_values = layer.update(keys[:, :, 5:], values[:, :, 5:])
    for exact, found in ((keys, found_keys), (values, found_values)):
        assert ((found - exact).abs() <= exact.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
        assert not torch.equal(found, exact)
    assert [one.dtype for one in layer.stored()] == [torch.int8, torch.float32] * 2
    assert layer.get_seq_length() == 7


def test_eager_keeps_a_third_and_computes_nearly_the_same() -> None:
    model = lmopt.Model.from_module(tiny_llama())
    plain, small = engine(model), engine(model, kv_cache_dtype="int8")
    ids = IDS % model.facts.vocab_size
    lengths = np.full(3, 24)
    expected, _ = plain.forward(ids, lengths, plain.begin(3))
    found, state = small.forward(ids, lengths, small.begin(3))
    # Its logits are almost equal, but not quite: it really is rounded.
    assert 0 < distance(expected.reshape(72, -1), found.reshape(72, -1)) < 1e-4
    before, after = (one.report().details for one in (plain, small))
    assert (before["kv_cache_dtype"], after["kv_cache_dtype"]) == ("float32", "int8")
    held = sum(one.numel() * one.element_size() for one in state.tensors.values())
    assert held == 3 * 24 * after["kv_cache_bytes_per_token"]
    width = model.config["hidden_size"] // model.config["num_attention_heads"]
    ratio = before["kv_cache_bytes_per_token"] / after["kv_cache_bytes_per_token"]
    assert ratio == 4 * width / (width + 4)


def test_no_split_no_neighbour_and_no_rewind_changes_a_row() -> None:
    model = lmopt.Model.from_module(tiny_llama())
    small = engine(model, kv_cache_dtype="int8")
    ids = IDS % model.facts.vocab_size
    whole, _ = small.forward(ids[:1], np.array([24]), small.begin(1))
    state = small.begin(3)
    _, state = small.forward(ids[:, :9], np.array([9, 4, 9]), state)
    state = small.rewind(small.select(state, np.array([2, 0])), np.array([3, 7]))
    state = small.join([small.select(state, np.array([1])), small.begin(1)])
    found, _ = small.forward(ids[[0, 2], 7:], np.array([17, 17]), state)
    np.testing.assert_allclose(found[0], whole[0, 7:], rtol=1e-4, atol=1e-4)


def test_models_of_ones_own_have_a_state_that_is_not_ours_to_round() -> None:
    for module in (tiny_gpt(), tiny_lstm()):
        with pytest.raises(UnsupportedError, match="kv_cache_dtype='int8' is for transformers"):
            engine(lmopt.Model.from_module(module), kv_cache_dtype="int8")
    with pytest.raises(UnsupportedOptionError, match="expected one of auto, int8"):
        engine(lmopt.Model.from_module(tiny_llama()), kv_cache_dtype="int4")


def test_onnx_runtime_runs_an_int8_cache_of_fixed_scales(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx_ir")
    model = lmopt.Model.from_module(tiny_llama())
    exporter = lmopt.Exporter("onnx", target="onnxruntime", kv_cache_dtype="int8")
    artifact = exporter.export(model, tmp_path / "out")
    assert artifact.manifest["formats"]["onnx"]["kv_cache_dtype"] == "int8"
    assert artifact.manifest["parity"]["onnx"]["tolerance"]["name"] == "int8-cache"
    ids = IDS[0] % model.facts.vocab_size
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(ids)[None]).logits[0].numpy()
    with lmopt.Runtime(artifact, backend="onnxruntime", kv_cache_dtype="int8") as runtime:
        details = runtime.engine.report().details
        assert details["kv_cache_dtype"] == "int8"
        plain = engine(model).report().details["kv_cache_bytes_per_token"]
        assert plain == 4 * details["kv_cache_bytes_per_token"]
        found = np.asarray(runtime.logits(ids[None]))[0]
    assert 0 < distance(expected, found) < 1e-3
    with lmopt.Runtime(model, backend="onnxruntime", kv_cache_dtype="int8") as runtime:
        assert runtime.engine.report().details["kv_cache_dtype"] == "int8"


def test_who_has_no_int8_cache_names_those_that_have(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx_ir")
    model = lmopt.Model.from_module(tiny_llama())
    with pytest.raises(UnsupportedOptionError, match="backend='torch', kv_cache_dtype='int8'"):
        lmopt.Exporter("onnx", kv_cache_dtype="int8").export(model, tmp_path / "a")
    gpt = lmopt.Model.from_module(tiny_gpt())
    with pytest.raises(UnsupportedError, match="backend='torch', kv_cache_dtype='int8'"):
        lmopt.Exporter("onnx", target="onnxruntime", kv_cache_dtype="int8").export(gpt, tmp_path / "b")
    artifact = lmopt.Exporter("onnx").export(model, tmp_path / "c")
    with pytest.raises(UnsupportedOptionError, match=r"Exporter\('onnx', target='onnxruntime'"):
        lmopt.Runtime(artifact, backend="onnxruntime", kv_cache_dtype="int8")
