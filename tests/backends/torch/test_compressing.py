"""Steps that change one matrix at a time, applied to whole models."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lmopt.backends.torch.calibration import readings
from lmopt.backends.torch.compressing import by_matrix, relative_error
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.quantizing import find_weights, matrix_of
from lmopt.backends.torch.scaling import find_producer
from lmopt.compression import AWQ, GPTQ, HQQ, Quantize, SparseGPT, UnknownModuleWarning
from lmopt.compression.hessian import damped
from lmopt.compression.statistics import Statistics
from lmopt.compression.step import Setting
from lmopt.errors import InputError, UnsupportedOptionError
from lmopt.testing.models import VOCAB_SIZE as VOCAB
from lmopt.testing.models import tiny_gpt, tiny_llama
from lmopt.testing.seq2seq import tiny_bart, tiny_t5, tiny_whisper


def setting(count=6, width=32):
    return Setting(VOCAB, list(np.random.default_rng(0).integers(0, VOCAB, (count, width))))


def logits(module):
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, (2, 24)))
    with torch.no_grad():
        result = module(ids)
    return (result.logits if hasattr(result, "logits") else result[0]).float()


def build(kind):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    if kind == "qwen3":
        made = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads))
    elif kind == "gemma3":
        made = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads))
    elif kind == "gpt2":
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        )
    else:
        return tiny_llama() if kind == "llama" else tiny_gpt()
    with torch.no_grad():
        for one in made.parameters():
            if one.dim() == 1:  # norms are born as ones, biases as zeros: neither would show a mistake
                one.add_(torch.empty_like(one).uniform_(-0.3, 0.3))
    return made.eval()


@dataclass(frozen=True, slots=True)
class OnlyScales(Quantize):
    """Scales inputs at random and rounds nothing."""

    name: ClassVar[str] = "only-scales"
    needs_texts: ClassVar[bool] = True

    def scales(self, weights, forms, statistics):
        width = weights[0].shape[1]
        return np.random.default_rng(width).uniform(0.3, 3, width).astype(np.float32)

    def apply(self, weight, form, name, statistics=None):
        return weight


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("qwen3", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gemma3", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_fc"}),
        ("gpt", {"qkv", "up"}),
    ],
)
def test_scaled_inputs_leave_the_model_as_it_was(kind, expected):
    module = build(kind)
    small = by_matrix(module, OnlyScales(embedding=None, head=None), setting())
    assert (logits(small) - logits(module)).abs().max() < 2e-4 * logits(module).abs().max()
    before = {one.path: matrix_of(module.get_submodule(one.path)) for one in find_weights(module, VOCAB)}
    changed = {
        path.rpartition(".")[2]
        for path, one in before.items()
        if not torch.equal(one, matrix_of(small.get_submodule(path)))
    }
    # c_proj of GPT-2 and down of an own GPT follow an activation: nothing before them can take scales.
    assert changed == expected


@pytest.mark.parametrize(
    ("build", "source", "expected"),
    [
        (tiny_t5, [5, 6, 7, 8, 1], {"q", "k", "v", "o", "wi", "wo"}),
        # Its norms come after the sum, which reads them too; the last one of the encoder is read by the decoder alone.
        (tiny_bart, [5, 6, 7, 8, 1], {"v_proj", "out_proj", "encoder_attn.k_proj"}),
        (tiny_whisper, None, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1"}),
    ],
)
def test_scaled_inputs_leave_an_encoder_decoder_as_it_was(build, source, expected):
    module = build()
    read = (
        np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32)
        if source is None
        else np.array(source)
    )
    given = Setting(VOCAB, [np.arange(3, 12)], sources=[read])
    small = by_matrix(module, OnlyScales(embedding=None, head=None), given)
    (pair,) = readings(module, given, 1)
    with torch.no_grad():
        ours, theirs = pair.logits(small), pair.logits(module)
    assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max()
    weights = [one.path for one in find_weights(module, VOCAB) if one.part == "linear"]
    changed = {
        path for path in weights
        if not torch.equal(matrix_of(module.get_submodule(path)), matrix_of(small.get_submodule(path)))
    }  # fmt: skip
    assert changed == {path for path in weights if any(path.endswith(f".{name}") for name in expected)}


def test_a_norm_with_another_reader_takes_no_scales():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            normed = self.norm(x)
            return self.linear(normed) + normed

    block = Block()
    x = torch.randn(1, 5, 8)
    assert find_producer([*block.modules()], [block.linear], lambda: block(x)) is None


def test_a_loud_residual_stream_does_not_hide_a_wrong_producer():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            loud = torch.zeros_like(x)
            loud[:, 0] = 1e6  # one token, as the first of a text often is
            loud[..., 3] += 300
            return x + loud + self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    block = Gated()
    x = torch.randn(1, 40, 8)
    found = find_producer([*block.modules()], [block.down], lambda: block(x))
    assert found is not None
    assert found.module is block.up


@pytest.mark.parametrize("step", [Quantize(4, 16), GPTQ(4, 16), AWQ(4, 16, n_grid=4)])
def test_the_original_stays_and_shares_nothing(step):
    module = tiny_llama()
    before = {name: one.clone() for name, one in module.state_dict().items()}
    small = by_matrix(module, step, setting())
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
    theirs = {one.data_ptr() for one in (*module.parameters(), *module.buffers())}
    assert not theirs & {one.data_ptr() for one in (*small.parameters(), *small.buffers())}
    assert all(not one.is_inference() for one in (*small.parameters(), *small.buffers()))
    assert quantized_parts(small)


@pytest.mark.parametrize("build_model", [tiny_llama, tiny_gpt])
def test_methods_that_see_texts_lose_less(build_model):
    module = build_model()
    with torch.no_grad():
        for part in module.modules():  # a few loud inputs, as trained models have them
            if "Norm" in type(part).__name__:
                part.weight[::9] *= 12
    found = {}
    for step in (Quantize(3, 32), GPTQ(3, 32), AWQ(3, 32)):
        used = setting(16, 64)
        small = by_matrix(module, step, used)
        wanted = {one.path for one in find_weights(module, VOCAB) if one.tied is None}
        assert used.errors.keys() == wanted
        found[step.name] = (logits(small) - logits(module)).pow(2).mean()
    assert found["gptq"] < found["rtn"]
    assert found["awq"] < found["rtn"]


def test_errors_are_those_of_the_outputs():
    random = np.random.default_rng(0)
    weight = random.normal(size=(6, 5)).astype(np.float32)
    other = weight + random.normal(size=(6, 5)).astype(np.float32) / 10
    x = random.normal(size=(100, 5)).astype(np.float32)
    read = Statistics((x.T @ x / 100).astype(np.float32), np.abs(x).mean(0), np.abs(x).max(0), 100)
    expected = np.linalg.norm((weight - other) @ x.T) / np.linalg.norm(weight @ x.T)
    assert relative_error(weight, other, read) == pytest.approx(expected, rel=1e-4)
    plain = np.linalg.norm(weight - other) / np.linalg.norm(weight)
    assert relative_error(weight, other, None) == pytest.approx(plain, rel=1e-5)
    assert relative_error(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32), None) == 0


def test_equal_texts_give_equal_models():
    module = tiny_llama()
    one, other = (by_matrix(module, GPTQ(4, 16), setting()).state_dict() for _ in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tied_weights_stay_one():
    module = tiny_llama()
    module.lm_head.weight = module.model.embed_tokens.weight
    small = by_matrix(module, GPTQ(4, 16), setting())
    assert small.lm_head.codes.data_ptr() == small.model.embed_tokens.codes.data_ptr()
    with pytest.raises(UnsupportedOptionError, match="one weight"):
        by_matrix(module, GPTQ(4, 16, head=None), setting())


def test_an_override_that_matches_nothing_names_near_ones():
    with pytest.raises(UnsupportedOptionError, match=r"down_proj"):
        by_matrix(tiny_llama(), GPTQ(4, 16, overrides={"*.downproj": None}), setting())


class Recurrent(nn.Module):
    """A language model whose blocks are no stack of linears."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.mix = nn.Conv1d(16, 16, 3, padding=2)
        self.rnn = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, ids):
        mixed = self.mix(self.embed(ids).transpose(1, 2))[..., : ids.shape[1]]
        return self.head(self.rnn(mixed.transpose(1, 2))[0])


@pytest.mark.parametrize(
    "step", [Quantize(8, 16), GPTQ(4, 16), SparseGPT(overrides={"head": {"sparsity": 0.5}})]
)
def test_modules_of_other_types_stay_as_they_are_and_are_named(step):
    module = Recurrent().eval()
    with pytest.warns(UnknownModuleWarning, match=r"rnn \(GRU, 1,536 weights\), mix \(Conv1d, 768 weights\)"):
        small = by_matrix(module, step, setting())
    for name in ("rnn", "mix"):
        mine, theirs = (one.get_submodule(name).state_dict() for one in (small, module))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert torch.isfinite(small(torch.zeros(1, 4, dtype=torch.long))).all()


def test_a_model_with_nothing_that_a_step_knows_is_refused():
    module = nn.Sequential(nn.GRU(8, 8))
    with pytest.raises(UnsupportedOptionError, match="no linear or embedding"):
        by_matrix(module, Quantize(8, 16), setting())


def test_models_of_linears_alone_warn_of_nothing(recwarn):
    for kind in ("llama", "gpt2", "gpt"):
        by_matrix(build(kind), Quantize(8, 16), setting())
    assert not [one for one in recwarn if one.category is UnknownModuleWarning]


@pytest.mark.parametrize("step", [Quantize(4, 16), GPTQ(4, 16), AWQ(4, 16, n_grid=3), SparseGPT()])
def test_an_interrupted_run_leaves_the_model_as_it_was(step):
    module = tiny_llama()
    before = {name: one.clone() for name, one in module.state_dict().items()}
    used = setting()

    def stop(stage, done, total):
        if stage == step.name and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        by_matrix(module, step, Setting(VOCAB, used.rows, stop))
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())
    assert not any(one._forward_pre_hooks or one._forward_hooks for one in module.modules())
    again, fresh = (by_matrix(one, step, used).state_dict() for one in (module, tiny_llama()))
    assert all(torch.equal(again[name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("step", [Quantize(4, 24), Quantize(4, 24, symmetric=False), GPTQ(4, 24), HQQ(4, 24)])
def test_groups_that_do_not_divide_a_row_are_filled_up(step):
    module = tiny_llama()
    columns = matrix_of(module.model.layers[0].self_attn.q_proj).shape[1]
    assert columns % 24
    small = by_matrix(module, step, setting())
    part = small.model.layers[0].self_attn.q_proj
    assert part.grid.groups == -(-columns // 24)
    assert part.array().values().shape == (columns, columns)
    even = by_matrix(module, replace(step, group_size=columns // 2), setting())
    ours, theirs = ((logits(one) - logits(module)).pow(2).mean() for one in (small, even))
    assert ours < 2 * theirs


def test_a_damaged_weight_is_named():
    module = tiny_llama()
    module.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        by_matrix(module, Quantize(4, 16), setting())


def test_progress_ends_at_its_total():
    told = []
    used = Setting(VOCAB, setting().rows, lambda stage, done, total: told.append((done, total)))
    by_matrix(tiny_llama(), GPTQ(4, 16), used)
    assert told[-1][0] == told[-1][1] == len(told)


def test_folded_scales_leave_the_model_and_help_the_next_step():
    module = build("llama")
    folded = by_matrix(module, AWQ(bits=3, group_size=16, n_grid=4, fold_only=True), setting())
    assert not quantized_parts(folded)
    assert torch.allclose(logits(folded), logits(module), atol=1e-4)
    changed = [
        path for path in ("model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj")
        if not torch.equal(folded.get_submodule(path).weight, module.get_submodule(path).weight)
    ]  # fmt: skip
    assert len(changed) == 2
    both = by_matrix(folded, GPTQ(bits=3, group_size=16, embedding=None, head=None), setting())
    assert quantized_parts(both)


@pytest.mark.parametrize("step", [GPTQ(bits=4, group_size=16, embedding=None, head=None), SparseGPT()])
def test_linears_that_read_one_tensor_share_a_factored_hessian(step, monkeypatch):
    calls = []

    def counted(gram, damping, shrinkage, name):
        calls.append(name)
        return damped(gram, damping, shrinkage, name)

    monkeypatch.setattr(f"{type(step).__module__}.damped", counted)
    by_matrix(build("llama"), step, setting())
    kinds = [name.rpartition(".")[2] for name in calls]
    assert kinds == ["q_proj", "o_proj", "gate_proj", "down_proj"] * 2


def tied(seed=0):
    import transformers

    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("bits", "read"), [(4, True), (8, False)])
def test_a_tied_head_is_rounded_by_what_it_reads(bits, read):
    module = tied()
    seen = {}

    @dataclass(frozen=True, slots=True)
    class Watched(GPTQ):
        name: ClassVar[str] = "watched"

        def apply(self, weight, form, name, statistics=None):
            seen[name] = statistics
            return GPTQ.apply(self, weight, form, name, statistics)

    step = Watched(bits=4, group_size=16, embedding=bits, head=bits)
    small = by_matrix(module, step, setting())
    assert next(iter(seen)) == "model.embed_tokens", "blocks must be changed on what they will read"
    assert (seen["model.embed_tokens"] is not None) == read
    parts = quantized_parts(small)
    assert parts["lm_head"].codes.data_ptr() == parts["model.embed_tokens"].codes.data_ptr()
    if read:
        plain = by_matrix(module, Quantize(bits=4, group_size=16, embedding=4, head=4), setting())
        weight, gram = matrix_of(module.lm_head).detach().numpy(), seen["model.embed_tokens"].gram
        losses = []
        for one in (small, plain):
            error = quantized_parts(one)["lm_head"].weight.numpy() - weight
            losses.append(float(np.vdot(error @ gram, error)))
        assert losses[0] < 0.9 * losses[1]
