"""Calibration: what linears are said to have read is what they read in the whole model."""

import numpy as np
import pytest
import torch
from torch import nn

from lmopt.backends.torch import calibration
from lmopt.backends.torch.calibration import find_stack, gathering, stages
from lmopt.backends.torch.language_model import is_transformers
from lmopt.compression.step import Setting
from lmopt.testing.models import tiny_gpt, tiny_llama


def rows(vocab, count=5, width=24):
    return list(np.random.default_rng(0).integers(0, vocab, (count, width)))


def linears(module):
    return [path for path, part in module.named_modules() if type(part) is nn.Linear]


def plainly(module, ids, paths):
    """Inputs of linears in whole passes, one row at a time."""
    seen = {path: [] for path in paths}
    hooks = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda part, args, path=path: seen[path].append(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for path in paths
    ]
    with torch.no_grad():
        for row in ids:
            batch = torch.from_numpy(row)[None]
            module(input_ids=batch, use_cache=False) if is_transformers(module) else module(batch)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts).numpy() for path, parts in seen.items()}


def qwen():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8,
        )
    ).eval()  # fmt: skip


def windowed():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, sliding_window=6, sliding_window_pattern=2,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("build", [tiny_llama, qwen, windowed, tiny_gpt])
@pytest.mark.parametrize("batch_tokens", [24, 48, 4096])
def test_what_was_read_is_what_whole_passes_show(build, batch_tokens, monkeypatch):
    monkeypatch.setattr(calibration, "_BATCH_TOKENS", batch_tokens)
    module = build()
    paths, ids = linears(module), rows(96)
    expected = plainly(module, ids, paths)
    found = {}
    for stage in stages(module, Setting(96, ids), paths):
        assert not found.keys() & stage.statistics.keys()
        found.update(stage.statistics)
    assert found.keys() == set(paths)
    for path, one in found.items():
        x = expected[path]
        assert one.tokens == len(x) == 5 * 24
        assert np.allclose(one.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-6), path
        assert np.allclose(one.mean_abs, np.abs(x).mean(0), rtol=1e-4)
        assert np.allclose(one.max_abs, np.abs(x).max(0), rtol=1e-4)


def test_later_blocks_read_what_changed_ones_make():
    module = tiny_llama()
    paths = linears(module)
    found = {}
    for stage in stages(module, Setting(96, rows(96)), paths):
        found.update(stage.statistics)
        for path in stage.statistics:
            module.get_submodule(path).weight.data *= 0.9
    changed = plainly(module, rows(96), paths)
    first, last = paths[0], paths[-2]
    assert np.allclose(found[first].mean_abs, np.abs(changed[first]).mean(0), rtol=1e-4)
    inputs = [path for path in paths if path.endswith("q_proj")]
    for path in inputs:
        assert np.allclose(found[path].mean_abs, np.abs(changed[path]).mean(0), rtol=1e-3)
    assert last in found


def test_a_stack_whose_blocks_do_not_follow_each_other_is_run_whole():
    class Skips(nn.Module):
        """Adds what the first block made to what the last one reads."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(96, 16)
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.head = nn.Linear(16, 96)

        def forward(self, ids, state=None):
            x = first = self.blocks[0](self.embed(ids))
            for block in self.blocks[1:]:
                x = block(x.tanh() + first)
            return self.head(x), None

    module = Skips().eval()
    paths = linears(module)
    found = [stage.statistics for stage in stages(module, Setting(96, rows(96)), paths)]
    assert len(found) == 1, "no block can be run by itself"
    expected = plainly(module, rows(96), paths)
    for path in paths:
        assert np.allclose(found[0][path].mean_abs, np.abs(expected[path]).mean(0), rtol=1e-4)


def test_statistics_that_do_not_fit_are_gathered_in_turns(monkeypatch):
    monkeypatch.setattr(calibration, "_MOST_BYTES", 3 * 4 * 64**2)
    module = nn.Sequential()
    module.add_module("embed", nn.Embedding(96, 64))
    for number in range(5):
        module.add_module(f"linear{number}", nn.Linear(64, 64))
    found = list(stages(module.eval(), Setting(96, rows(96)), linears(module)))
    assert [len(stage.statistics) for stage in found] == [3, 2]


def test_the_consumer_is_not_inside_inference_mode():
    module = tiny_llama()
    for _ in stages(module, Setting(96, rows(96)), linears(module)):
        assert not torch.is_inference_mode_enabled()
        assert not torch.zeros(1).is_inference()


def test_linears_that_read_one_tensor_share_the_work():
    module = tiny_llama()
    block = "model.layers.0.self_attn."
    with gathering(module, [block + "q_proj", block + "k_proj"]) as gathered, torch.no_grad():
        module(input_ids=torch.from_numpy(rows(96)[0])[None], use_cache=False)
    found = gathered()
    assert found[block + "q_proj"] is found[block + "k_proj"]


def test_the_longest_list_of_equal_blocks_is_the_stack():
    assert find_stack(tiny_llama())[0] == "model.layers"
    assert find_stack(nn.Linear(3, 3)) is None
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(3)))
    assert find_stack(nn.ModuleDict({"body": blocks}))[0] == "body"
    # Layers of one block are no blocks.
    assert find_stack(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))) is None
