"""Whole blocks are dropped: those that do nothing first, and what stays computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from structured_models import IDS, VOCAB_SIZE, Stacked, distance, family, logits, setting

import lmopt
from lmopt.backends.torch.blocks import block_influences, bypassed, drop_blocks
from lmopt.backends.torch.quantizing import stored_bytes
from lmopt.backends.torch.reconfiguring import reconfigure
from lmopt.compression import Quantize
from lmopt.compression.depth import DropBlocks
from lmopt.compression.step import Setting
from lmopt.errors import CorruptArtifactError, InputError, UnsupportedError, UnsupportedOptionError

BOTH = ["block-influence", "perplexity"]
_OUT = {"gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj")}
_LLAMA = ("model.layers", "self_attn.o_proj", "mlp.down_proj")


def silence(module: Any, name: str, place: int) -> None:
    """Let a block hand on what it is given."""
    path, *outputs = _OUT.get(name, _LLAMA)
    for output in outputs:
        for weight in module.get_submodule(f"{path}.{place}.{output}").parameters():
            weight.data.zero_()


@pytest.mark.parametrize("score", BOTH)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gpt2", "phi3"])
def test_silent_blocks_go_and_nothing_else(name: str, score: Any) -> None:
    module = family(name)
    silence(module, name, 1)
    if score == "block-influence":
        silence(module, name, 2)  # by loss, one that harms goes before one that does nothing
    before = logits(module)
    path = _OUT.get(name, _LLAMA)[0]
    count = 2 if score == "block-influence" else 1
    step = DropBlocks(count=count, score=score)
    # All others do something that these texts need: the model's own most likely tokens.
    small = drop_blocks(module, step, Setting(VOCAB_SIZE, [row.numpy() for row in _likely(module)]))
    kept = [0, 3] if count == 2 else [0, 2, 3]
    assert torch.equal(logits(small), before)
    for new, old in enumerate(kept):
        ours, theirs = small.get_submodule(f"{path}.{new}"), module.get_submodule(f"{path}.{old}")
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, two)
            assert one.data_ptr() != two.data_ptr()
    assert small.config.num_hidden_layers == len(kept)
    assert module.config.num_hidden_layers == 4


def _likely(module: Any) -> torch.Tensor:
    ids = IDS
    for _ in range(24):
        ids = torch.cat([ids, logits(module, ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_influence_is_a_turn_of_the_stream() -> None:
    module: Any = family("llama")
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _part, args, result: states.extend((args[0], result)))
        for layer in module.model.layers
    ]
    logits(module)
    for hook in hooks:
        hook.remove()
    found = block_influences(module, module.model.layers, [IDS])
    for place in range(4):
        x, y = states[2 * place], states[2 * place + 1]
        cosines = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
        assert found[place] == pytest.approx(1 - float(cosines.mean()), abs=1e-5)


def test_the_measured_loss_chooses_what_hurts_least() -> None:
    module: Any = family("llama")
    rows = _likely(module)
    losses = []
    for place in range(4):
        with bypassed(module.model.layers, [place]):
            found = logits(module, rows)[:, :-1].transpose(1, 2)
        losses.append(float(torch.nn.functional.cross_entropy(found, rows[:, 1:])))
    small = drop_blocks(
        module, DropBlocks(count=1, score="perplexity"), Setting(VOCAB_SIZE, [row.numpy() for row in rows])
    )
    with bypassed(module.model.layers, [losses.index(min(losses))]):
        assert torch.equal(logits(small), logits(module))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "gemma2", "gpt-oss", "gpt2", "mixtral"])
def test_folders_bring_the_same_model_back(name: str, tmp_path: Path) -> None:
    model = lmopt.Model.from_module(family(name))
    step = DropBlocks(count=1)
    small = model.with_module(drop_blocks(model.module, step, setting()), recipe=[step.to_dict()])
    assert stored_bytes(small.module) < 0.9 * stored_bytes(model.module)
    assert small.facts.parameters < model.facts.parameters
    small.save_pretrained(tmp_path / "m")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert torch.equal(logits(plain), logits(small.module))
    back = lmopt.Model.from_pretrained(tmp_path / "m")
    assert back.fingerprint() == small.fingerprint()
    assert back.facts == small.facts
    # The cache of the shallower model has no gaps.
    told = lmopt.Runtime(small)
    assert told.generate([1, 5, 9], max_new_tokens=4).token_ids == _greedy(small.module, [1, 5, 9], 4)


def _greedy(module: Any, ids: list[int], count: int) -> list[int]:
    row = torch.tensor([ids])
    for _ in range(count):
        row = torch.cat([row, logits(module, row)[:, -1:].argmax(-1)], 1)
    found: list[int] = row[0, len(ids) :].tolist()
    return found


def test_windows_stay_with_their_blocks() -> None:
    module: Any = family("gemma2")
    windows = [layer.self_attn.sliding_window for layer in module.model.layers]
    silence_gemma(module, 0)
    small: Any = drop_blocks(module, DropBlocks(count=1), setting())
    assert [layer.self_attn.sliding_window for layer in small.model.layers] == windows[1:]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2]
    assert small.config.layer_types == module.config.layer_types[1:]
    long = torch.arange(64)[None] % VOCAB_SIZE
    assert torch.equal(logits(small, long), logits(module, long))


def silence_gemma(module: Any, place: int) -> None:
    """Gemma 2 has norms behind its parts."""
    layer = module.model.layers[place]
    for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
        norm.weight.data.fill_(-1.0)  # its gain is 1 + weight


def test_a_block_that_would_change_its_kind_is_refused() -> None:
    """Qwen 3 MoE says by a block's number whether it has experts: the numbers do not move along."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        decoder_sparse_step=2,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.Qwen3MoeForCausalLM(config).eval()
    with pytest.raises(UnsupportedError, match="cannot do without blocks"):
        drop_blocks(module, DropBlocks(count=1), setting())


def test_a_window_that_would_move_is_refused() -> None:
    small: Any = family("gemma2")
    small.model.layers = torch.nn.ModuleList(list(small.model.layers)[1:])
    kept = ("model.layers", [1, 2, 3])
    changes = {"num_hidden_layers": 3, "layer_types": small.config.layer_types[:3]}
    assert "block 1 would become block 0" in str(reconfigure(small, [changes], kept_blocks=kept))
    changes["layer_types"] = small.config.layer_types[1:]
    assert reconfigure(small, [changes], kept_blocks=kept) is None


def test_depth_and_unequal_widths_go_together(tmp_path: Path) -> None:
    from lmopt.backends.torch.structure import prune_channels
    from lmopt.compression.channels import PruneChannels

    model = lmopt.Model.from_module(family("llama"))
    module = prune_channels(model.module, PruneChannels(0.25, uniform=False, multiple=4), setting())
    small = model.with_module(drop_blocks(module, DropBlocks(count=2), setting()))
    small.save_pretrained(tmp_path / "m")
    assert torch.equal(logits(lmopt.Model.from_pretrained(tmp_path / "m").module), logits(small.module))


def test_an_own_module_is_cut_and_comes_back(tmp_path: Path) -> None:
    module = Stacked()
    for weight in module.parts[2].down.parameters():
        weight.data.zero_()
    model = lmopt.Model.from_module(module)
    small = model.with_module(drop_blocks(module, DropBlocks(count=1), setting()))
    assert torch.equal(logits(small.module), logits(module))
    assert [part.place for part in small.module.parts] == [0, 1, 2]
    assert [part.place for part in module.parts] == [0, 1, 2, 3]
    # Places of a second cut are told by the first module's count.
    again = small.with_module(drop_blocks(small.module, DropBlocks(count=1), setting()))
    again.save_pretrained(tmp_path / "m")
    back = lmopt.Model.from_module(Stacked(seed=3)).load_weights(tmp_path / "m")
    assert torch.equal(logits(back.module), logits(again.module))
    with pytest.raises(CorruptArtifactError, match="as it was before"):
        lmopt.Model.from_module(Stacked(blocks=2)).load_weights(tmp_path / "m")


class InARow(Stacked):
    """Blocks that torch runs one after the other."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.parts = torch.nn.Sequential(*self.parts)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.parts(self.table(input_ids)))
        return result


def test_a_sequential_is_a_list_of_blocks_too(tmp_path: Path) -> None:
    module = InARow()
    for weight in module.parts[1].down.parameters():
        weight.data.zero_()
    small = lmopt.Model.from_module(module).with_module(drop_blocks(module, DropBlocks(count=1), setting()))
    assert isinstance(small.module.parts, torch.nn.Sequential)
    assert len(small.module.parts) == 3
    assert torch.equal(logits(small.module), logits(module))
    small.save_pretrained(tmp_path / "m")
    back = lmopt.Model.from_module(InARow(seed=3)).load_weights(tmp_path / "m")
    assert torch.equal(logits(back.module), logits(small.module))


class Crossed(Stacked):
    """Blocks that are not run one after the other."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(input_ids)
        result: torch.Tensor = self.head(sum((part(hidden) for part in self.parts), hidden))
        return result


def test_blocks_side_by_side_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"parts\.1 does not read"):
        drop_blocks(Crossed(), DropBlocks(count=1), setting())


@pytest.mark.parametrize(
    ("name", "told"), [("tiny-gpt", "does not run after dropping"), ("tiny-lstm", "no list")]
)
def test_what_has_no_loose_blocks_is_refused(name: str, told: str) -> None:
    with pytest.raises(UnsupportedError, match=told):
        drop_blocks(family(name), DropBlocks(count=1), setting())


def test_bad_input_is_refused() -> None:
    module: Any = family("llama")
    with pytest.raises(InputError, match="calibration texts"):
        drop_blocks(module, DropBlocks(count=1), Setting(VOCAB_SIZE))
    with pytest.raises(UnsupportedOptionError, match="4 of 4 blocks"):
        drop_blocks(module, DropBlocks(count=4), setting())
    from lmopt.backends.torch.compressing import by_matrix

    with pytest.raises(UnsupportedOptionError, match="quantize then"):
        drop_blocks(by_matrix(module, Quantize(8), Setting(VOCAB_SIZE)), DropBlocks(count=1), setting())
    module.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    for score in BOTH:
        with pytest.raises(InputError, match="block 2"):
            drop_blocks(module, DropBlocks(count=1, score=score), setting())  # type: ignore[arg-type]


def test_progress_is_told() -> None:
    seen: list[tuple[str, int, int]] = []
    told = setting(progress=lambda *one: seen.append(one))
    drop_blocks(family("llama"), DropBlocks(count=2, score="perplexity"), told)
    assert seen == [("drop_blocks", done, 7) for done in range(1, 8)]
    assert distance(torch.zeros(1), torch.zeros(1)) == 0
