"""Channels and heads are cut out for good: what stays computes the same, in a smaller plain model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from structured_models import VOCAB_SIZE, Stacked, distance, family, logits, setting
from torch import nn

import lmopt
from lmopt.backends.torch.quantizing import matrix_of, set_matrix, stored_bytes
from lmopt.backends.torch.structure import prune_channels, prune_heads
from lmopt.compression import Quantize
from lmopt.compression.channels import PruneChannels
from lmopt.compression.heads import PruneHeads
from lmopt.compression.step import Setting
from lmopt.errors import InputError, UnsupportedError, UnsupportedOptionError


def kill(module: nn.Module, path: str, columns: Any) -> None:
    """Let a linear no longer read some inputs."""
    part = module.get_submodule(path)
    matrix = matrix_of(part).detach().clone()
    matrix[:, columns] = 0
    set_matrix(part, matrix)


def kill_channels(module: nn.Module, down: str, counts: list[int], width: int) -> list[list[int]]:
    """Plant dead channels at random places; return those that live."""
    random = np.random.default_rng(5)
    alive = []
    for place, count in enumerate(counts):
        dead = random.permutation(width)[:count]
        kill(module, down.format(place), dead)
        alive.append(np.setdiff1d(np.arange(width), dead).tolist())
    return alive


_CHANNELS = {
    "llama": ("model.layers.{}.mlp.down_proj", "model.layers.{}.mlp.up_proj", 64, "intermediate_size"),
    "llama-tied": ("model.layers.{}.mlp.down_proj", "model.layers.{}.mlp.up_proj", 64, "intermediate_size"),
    "qwen3": ("model.layers.{}.mlp.down_proj", "model.layers.{}.mlp.up_proj", 64, "intermediate_size"),
    "phi3": ("model.layers.{}.mlp.down_proj", "model.layers.{}.mlp.gate_up_proj", 64, "intermediate_size"),
    "gpt2": ("transformer.h.{}.mlp.c_proj", "transformer.h.{}.mlp.c_fc", 128, "n_inner"),
}
_SCORES = [{}, {"refit": False}, {"score": "weight", "refit": False}]


@pytest.mark.parametrize("fields", _SCORES, ids=str)
@pytest.mark.parametrize("name", _CHANNELS)
def test_dead_channels_go_and_nothing_else(name: str, fields: dict[str, Any]) -> None:
    down, up, width, field = _CHANNELS[name]
    module = family(name)
    alive = kill_channels(module, down, [width // 4] * 4, width)
    before, state = logits(module), {path: one.clone() for path, one in module.state_dict().items()}
    small: Any = prune_channels(module, PruneChannels(0.25, **fields), setting())
    assert all(torch.equal(one, state[path]) for path, one in module.state_dict().items())
    assert getattr(small.config, field) == width * 3 // 4
    assert distance(logits(small), before) < 1e-5 * float(before.abs().max())
    for place, kept in enumerate(alive):
        rows = matrix_of(small.get_submodule(up.format(place)))
        whole = matrix_of(module.get_submodule(up.format(place)))
        both = [*kept, *(width + one for one in kept)] if len(whole) == 2 * width else kept
        assert torch.equal(rows, whole[both])


@pytest.mark.parametrize("name", ["llama", "gpt2", "stacked"])
def test_layers_may_keep_unequal_widths(name: str) -> None:
    down, up, width = ("parts.{}.down", "parts.{}.up", 32) if name == "stacked" else _CHANNELS[name][:3]
    module: nn.Module = Stacked() if name == "stacked" else family(name)
    dead = [width // 2, 0, width // 4, width // 4]
    kill_channels(module, down, dead, width)
    before = logits(module)
    small = prune_channels(module, PruneChannels(0.25, uniform=False, multiple=8), setting())
    widths = [matrix_of(small.get_submodule(up.format(place))).shape[0] for place in range(4)]
    assert widths == [width - one for one in dead]
    assert distance(logits(small), before) < 1e-5 * float(before.abs().max())


_KV = {"llama": True, "qwen2": True, "qwen3": True, "phi3": True, "gemma2": True, "gpt-oss": True}


@pytest.mark.parametrize("fields", _SCORES, ids=str)
@pytest.mark.parametrize("name", _KV)
def test_dead_heads_go_and_nothing_else(name: str, fields: dict[str, Any]) -> None:
    module: Any = family(name)
    if name == "gpt-oss":
        for layer in module.model.layers:
            layer.self_attn.sinks.data = torch.randn(4)
    for place in range(4):
        kill(module, f"model.layers.{place}.self_attn.o_proj", slice(16 * (place % 2), 16 * (place % 2) + 16))
    before = logits(module)
    small: Any = prune_heads(module, PruneHeads(share=0.5, **fields), setting())
    config = small.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert distance(logits(small), before) < 1e-5 * float(before.abs().max())
    for place in range(4):
        theirs = matrix_of(module.model.layers[place].self_attn.o_proj)
        ours = matrix_of(small.model.layers[place].self_attn.o_proj)
        assert torch.equal(ours, theirs[:, 16 * (1 - place % 2) : 16 * (2 - place % 2)])
    cache = small(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (1, 1, 3, 8)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3", "phi3", "gemma2", "gpt2"])
@pytest.mark.parametrize("kind", ["channels", "unequal", "heads"])
def test_folders_bring_the_same_model_back(name: str, kind: str, tmp_path: Path) -> None:
    if (name, kind) == ("gpt2", "heads"):
        pytest.skip("its configuration has no size of a head")
    model = lmopt.Model.from_module(family(name))
    step: Any = {
        "channels": PruneChannels(0.25),
        "unequal": PruneChannels(0.25, uniform=False, multiple=4),
        "heads": PruneHeads(keep=1),
    }[kind]
    prune: Any = prune_heads if kind == "heads" else prune_channels
    fingerprint = model.fingerprint()
    small = model.with_module(prune(model.module, step, setting()), recipe=[step.to_dict()])
    assert model.fingerprint() == fingerprint
    assert stored_bytes(small.module) < stored_bytes(model.module)
    assert small.facts.parameters == sum(one.numel() for one in small.module.parameters())
    small.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "whole")
    sizes = [(tmp_path / one / "model.safetensors").stat().st_size for one in ("m", "whole")]
    assert sizes[0] < 0.97 * sizes[1]
    back = lmopt.Model.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(back.module), logits(small.module))
    assert back.fingerprint() == small.fingerprint()
    assert back.facts == small.facts
    if kind == "unequal":
        assert "lmopt_widths" in small.config
    else:
        plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert torch.equal(logits(plain.eval()), logits(small.module))
    if "tied" in name:
        assert back.module.lm_head.weight.data_ptr() == back.module.model.embed_tokens.weight.data_ptr()
        assert small.module.lm_head.weight is small.module.model.embed_tokens.weight


def test_the_copy_shares_nothing_with_the_model() -> None:
    module = family("llama-tied")
    before = logits(module)
    small = prune_channels(module, PruneChannels(0.25), setting())
    for one in small.state_dict().values():
        one.zero_()
    assert torch.equal(logits(module), before)


def test_refitting_loses_less() -> None:
    module = family("llama")
    before, losses = logits(module), []
    for refit in (True, False):
        told = setting(rows=32)
        small = prune_channels(module, PruneChannels(0.25, refit=refit, damping=0.01), told)
        losses.append(float((logits(small) - before).square().mean()))
        assert set(told.errors) == {f"model.layers.{place}.mlp.down_proj" for place in range(4)}
        assert all(0 < one < 1 for one in told.errors.values())
    assert losses[0] < 0.8 * losses[1]


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    told = setting(progress=lambda *one: seen.append(one))
    prune_channels(family("llama"), PruneChannels(0.25), told)
    assert seen == [("prune_channels", done, 4) for done in range(1, 5)]


def test_steps_follow_each_other(tmp_path: Path) -> None:
    model = lmopt.Model.from_module(family("llama"))
    module = prune_channels(model.module, PruneChannels(0.25, uniform=False, multiple=4), setting())
    module = prune_heads(module, PruneHeads(keep=1), setting())
    module = prune_channels(module, PruneChannels(0.2, uniform=False, multiple=4), setting())
    from lmopt.backends.torch.compressing import by_matrix

    small = model.with_module(by_matrix(module, Quantize(8, 4), Setting(VOCAB_SIZE)))
    small.save_pretrained(tmp_path / "m")
    back = lmopt.Model.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(back.module), logits(small.module))
    assert back.config["num_attention_heads"] == 2
    with pytest.raises(UnsupportedError, match="uniform=False"):
        prune_channels(module, PruneChannels(0.25, multiple=4), setting())


def test_a_recipe_runs_in_the_compressor() -> None:
    from lmopt.evaluation.tolerances import Tolerance

    limits = Tolerance("any", kl_mean=1e9, top1=0.0, perplexity_ratio=1e9)
    model = lmopt.Model.from_module(family("llama"))
    small = lmopt.Compressor([PruneChannels(0.25), PruneHeads(keep=1)], tolerance=limits).compress(model)
    assert small.config["intermediate_size"] == 48
    assert small.facts.parameters < model.facts.parameters
    assert [one["step"] for one in small.recipe] == ["prune_channels", "prune_heads"]
    assert small.report is not None
    assert small.report.bytes < small.report.float_bytes


def test_an_own_module_is_cut_and_comes_back(tmp_path: Path) -> None:
    model = lmopt.Model.from_module(family("tiny-gpt"), context_length=128)
    small = model.with_module(prune_channels(model.module, PruneChannels(0.25), setting()))
    assert small.module.blocks[0].up.out_features == 96
    artifact = small.save_pretrained(tmp_path / "m")
    entry = artifact.manifest["formats"]["safetensors"]
    assert entry["structure"]["widths"]["blocks.1.down"] == [32, 96]
    from lmopt.testing.models import tiny_gpt

    back = lmopt.Model.from_module(tiny_gpt(seed=7)).load_weights(tmp_path / "m")
    assert torch.equal(logits(back.module), logits(small.module))
    again = lmopt.Model.from_module(back.module).load_weights(tmp_path / "m")
    assert torch.equal(logits(again.module), logits(small.module))


def test_code_that_fixes_its_heads_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not run after cutting"):
        prune_heads(family("tiny-gpt"), PruneHeads(keep=2), setting())


class Halved(Stacked):
    """A model that computes something else when its width changes."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(input_ids) * self.parts[0].up.weight.shape[0]
        return result


def test_code_that_depends_on_its_width_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="computes something else"):
        prune_channels(Halved(), PruneChannels(0.5), setting())


def test_what_a_configuration_cannot_say_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="2 heads of 8 is nothing that transformers could load"):
        prune_heads(family("gpt2"), PruneHeads(keep=2), setting())


@pytest.mark.parametrize("rows", [[], None])
def test_texts_are_needed(rows: Any) -> None:
    with pytest.raises(InputError, match="calibration texts"):
        prune_channels(family("llama"), PruneChannels(0.25), Setting(VOCAB_SIZE, rows or ()))
    small: Any = prune_channels(
        family("llama"), PruneChannels(0.25, score="weight", refit=False), Setting(VOCAB_SIZE)
    )
    assert small.config.intermediate_size == 48


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_damaged_models_are_refused(part: str) -> None:
    module: Any = family("llama")
    getattr(module.model.layers[1].mlp, part).weight.data[0, 0] = float("nan")
    for fields in ({}, {"score": "weight", "refit": False}):
        with pytest.raises(InputError, match="NaN"):
            prune_channels(module, PruneChannels(0.25, **fields), setting())


def test_too_small_a_share_is_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="multiple"):
        prune_channels(family("llama"), PruneChannels(0.05), setting())


def _config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["lmopt_widths"])
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "lmopt.json").unlink()  # its hashes would find out first


_DOWN = "model.layers.0.mlp.down_proj"
_FAULTS: dict[str, tuple[Any, str]] = {
    "a part is unknown": (lambda w: w.update(ghost=[1, 1]), "ghost"),
    "no linear": (lambda w: w.update({"model.norm": [1, 1]}), "no linear"),
    "larger": (lambda w: w.update({_DOWN: [32, 65]}), r"\[32, 65\]"),
    "wider": (lambda w: w.update({_DOWN: [48, 48]}), r"cut out of \(32, 64\)"),
    "nothing": (lambda w: w.update({_DOWN: [32, 0]}), r"\[32, 0\]"),
    "text": (lambda w: w.update({_DOWN: "48"}), "48"),
    "three": (lambda w: w.update({_DOWN: [1, 2, 3]}), r"\[1, 2, 3\]"),
    "another": (lambda w: w.update({_DOWN: [32, 8]}), "misshapen: .*layers.0.mlp.down_proj"),
    "absent": (lambda w: w.pop(_DOWN), "misshapen: .*layers.0.mlp.down_proj"),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_damaged_widths_are_refused(fault: str, tmp_path: Path) -> None:
    model = lmopt.Model.from_module(family("llama"))
    small = model.with_module(
        prune_channels(model.module, PruneChannels(0.25, uniform=False, multiple=4), setting())
    )
    small.save_pretrained(tmp_path / "m")
    change, told = _FAULTS[fault]
    _config(tmp_path / "m", change)
    with pytest.raises(lmopt.errors.CorruptArtifactError, match=told):
        lmopt.Model.from_pretrained(tmp_path / "m")
