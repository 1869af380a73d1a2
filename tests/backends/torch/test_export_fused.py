"""The dialect of ONNX Runtime: every family leaves as its operators, right for every batch, or falls back."""

import collections
import gc
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from torch import nn

from lmopt.artifact import Artifact
from lmopt.backends.torch.fused import export as fused_export
from lmopt.backends.torch.fused.reason import InexpressibleError
from lmopt.backends.torch.language_model import as_decoder
from lmopt.contracts import EngineRequest
from lmopt.errors import UnsupportedOptionError
from lmopt.exporter import Exporter
from lmopt.model import Model
from lmopt.registry import backends
from lmopt.runtime import Runtime
from lmopt.testing.models import CONTEXT_LENGTH, tiny_gpt, tiny_llama, tiny_lstm

VOCAB = 99
# Heads of 16: GroupQueryAttention rotates multiples of 16 only.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {"sliding_window": 8}
MIXED = {**WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}

# What the attention operators of a family must say, layer by layer, beside their sizes.
FAMILIES: dict[str, tuple[Mapping[str, Any], list[dict[str, Any]]]] = {
    "llama": (SIZES, [{"rotary": 8}, {"rotary": 8}]),
    "qwen2": (SIZES, [{"rotary": 8}, {"rotary": 8}]),
    "qwen3": ({**SIZES, "head_dim": 16}, [{"rotary": 8}, {"rotary": 8}]),
    "mistral": ({**SIZES, **WINDOW}, [{"rotary": 8, "local_window_size": 8}] * 2),
    "gemma2": (
        {**SIZES, **MIXED},
        [{"rotary": 8, "local_window_size": 8, "softcap": 50.0}, {"rotary": 8, "softcap": 50.0}],
    ),
    "gemma3_text": ({**SIZES, **MIXED}, [{"rotary": 8, "local_window_size": 8}, {"rotary": 8}]),
    "phi3": ({**SIZES, "hidden_size": 128, "partial_rotary_factor": 0.5}, [{"rotary": 8}] * 2),
    "gpt_neox": ({**SIZES, "hidden_size": 256, "rotary_pct": 0.25}, [{"rotary": 8}] * 2),
    "gpt2": (GPT_SIZES, [{}, {}]),
    "olmo2": (SIZES, [{"rotary": 8}] * 2),
    "stablelm": ({**SIZES, "hidden_size": 256}, [{"rotary": 8}] * 2),
    "smollm3": ({**SIZES, "num_hidden_layers": 4}, [{"rotary": 8}] * 3 + [{}]),
    "cohere": (SIZES, [{"rotary": 8, "rotary_interleaved": 1}] * 2),
    "qwen3_moe": ({**SIZES, **EXPERTS, "head_dim": 16}, [{"rotary": 8}] * 2),
    "gpt_oss": (
        {**SIZES, **WINDOW, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        [{"rotary": 8, "local_window_size": 8, "sink": True}, {"rotary": 8, "sink": True}],
    ),
}
IN_A_NORMAL_RUN = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2")


def make_family(name: str, sizes: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a random model whose logits spread, so that a wrong one cannot pass by luck."""
    config = transformers.AutoConfig.for_model(name, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for weight in module.parameters():
            with torch.no_grad():
                if weight.dim() > 1:
                    weight.normal_(0, 0.2)
                else:
                    # Gains and biases of their own, so that a lost one shows.
                    weight.add_(torch.randn_like(weight) * 0.1)
    return module.to(dtype)


def fused(module: nn.Module, folder: Path, **options: Any) -> tuple[Model, Artifact]:
    model = Model.from_module(module, context_length=CONTEXT_LENGTH)
    return model, Exporter("onnx", target="onnxruntime", **options).export(model, folder)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Model, Artifact]]:
    """Export a tiny model by name, once for all tests of this file."""
    done: dict[str, tuple[Model, Artifact]] = {}

    def get(name: str) -> tuple[Model, Artifact]:
        if name not in done:
            done[name] = fused(make_family(name, FAMILIES[name][0]), tmp_path_factory.mktemp("fused") / name)
        return done[name]

    return get


def load_graph(artifact: Artifact) -> onnx.GraphProto:
    return onnx.load(str(artifact.file("model.onnx")), load_external_data=False).graph


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def attention_facts(graph: onnx.GraphProto) -> list[dict[str, Any]]:
    shapes = {one.name: tuple(one.dims) for one in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        said = attributes(node)
        inputs = dict(enumerate(node.input))
        facts: dict[str, Any] = {
            name: said[name] for name in ("local_window_size", "softcap") if name in said
        }
        if said.get("do_rotary"):
            facts["rotary"] = shapes[inputs[7]][1]
        if said.get("rotary_interleaved"):
            facts["rotary_interleaved"] = 1
        if inputs.get(11):
            facts["sink"] = True
        found.append(facts)
    return found


def read_again(module: nn.Module, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens by whole forward passes of the author's own module: no cache, mask or padding."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# Families ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_leaves_as_operators_and_gives_the_authors_tokens(
    export: Callable[[str], tuple[Model, Artifact]], name: str, full_sweep: bool
) -> None:
    if name not in IN_A_NORMAL_RUN and not full_sweep:
        pytest.skip("runs with --full-sweep")
    model, artifact = export(name)
    said = artifact.manifest["formats"]["onnx"]
    assert said["target"] == "onnxruntime", said.get("fallback")
    assert "fallback" not in said
    graph = load_graph(artifact)
    assert attention_facts(graph) == FAMILIES[name][1]
    inputs = [one.name for one in graph.input if not one.name.startswith("past")]
    learned = ["position_ids"] if name == "gpt2" else []
    assert inputs == ["input_ids", "attention_mask", *learned, "logits_to_keep"]
    # The gate has met rows of unequal length, and several tokens on a past.
    assert {"prefill", "greedy"} < set(artifact.manifest["parity"]["onnx"]["cases"])
    rng = np.random.default_rng(5)
    rows = [rng.integers(3, VOCAB, size).tolist() for size in (3, 21, 11)]
    expected = [read_again(model.module, row, 10) for row in rows]
    assert len({tuple(row) for row in expected}) == 3
    with Runtime(artifact, backend="onnxruntime") as runtime:
        together = runtime.generate(rows, max_new_tokens=10, eos_token_id=None, pad_token_id=None)
    assert [one.token_ids for one in together] == expected


def test_heads_that_the_operator_cannot_rotate_are_rotated_by_the_graph(tmp_path: Path) -> None:
    _, artifact = fused(tiny_llama(), tmp_path / "out")
    assert artifact.manifest["formats"]["onnx"]["target"] == "onnxruntime"
    graph = load_graph(artifact)
    assert attention_facts(graph) == [{}, {}]
    assert "position_ids" in [one.name for one in graph.input]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_half_precision_passes_its_gate(tmp_path: Path, name: str) -> None:
    module = make_family(name, FAMILIES[name][0], torch.float16)
    _, artifact = fused(module, tmp_path / "out")
    said = artifact.manifest["formats"]["onnx"]
    assert (said["target"], said["dtype"]) == ("onnxruntime", "float16")


# The graph --------------------------------------------------------------------------------------


def test_a_layer_of_llama_is_nine_operators(export: Callable[[str], tuple[Model, Artifact]]) -> None:
    graph = load_graph(export("llama")[1])
    counts = collections.Counter(node.op_type for node in graph.node)
    layers = 2
    assert counts == {
        # In each layer.
        "MatMul": 4 * layers + 1,
        "GroupQueryAttention": layers,
        "SkipSimplifiedLayerNormalization": 2 * layers,
        "Split": layers,
        "QuickGelu": layers,
        "Mul": layers,
        # Once: embedding, first norm, lengths from the mask, and the last positions.
        "Gather": 2,
        "SimplifiedLayerNormalization": 1,
        "ReduceSum": 1,
        "Sub": 1,
        "Shape": 3,
        "Cast": 3,
        "Expand": 1,
        "Neg": 1,
        "Slice": 1,
    }
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            # Queries, keys and values are packed.
            assert [bool(name) for name in node.input[:3]] == [True, False, False]


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_stored_once(tmp_path: Path, tied: bool) -> None:
    module = make_family("llama", {**SIZES, "vocab_size": 2048, "tie_word_embeddings": tied})
    _, artifact = fused(module, tmp_path / "out")
    weights = sum(one.numel() * 4 for one in module.parameters())
    stored = artifact.file("model.onnx.data").stat().st_size
    tables = 2 * 128 * 8 * 4
    assert weights <= stored + 4096
    assert stored < weights + tables + 64 * 1024
    operators = {node.op_type for node in load_graph(artifact).node}
    assert "Transpose" not in operators
    assert ("FusedMatMul" in operators) == tied


def test_the_logits_of_the_last_positions_can_be_asked_for(
    export: Callable[[str], tuple[Model, Artifact]],
) -> None:
    _, artifact = export("llama")
    session = ort.InferenceSession(str(artifact.file("model.onnx")), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_overridable_initializers()] == ["logits_to_keep"]
    feeds = {"input_ids": np.arange(3, 13).reshape(2, 5), "attention_mask": np.ones((2, 5), np.int64)}
    feeds |= {
        one.name: np.zeros((2, 2, 8, 16), np.float32)
        for one in session.get_inputs()
        if one.name.startswith("past")
    }
    (every,) = session.run(["logits"], feeds)
    assert every.shape == (2, 5, VOCAB)
    for keep in (1, 2):
        (last,) = session.run(["logits"], {**feeds, "logits_to_keep": np.array([keep])})
        np.testing.assert_allclose(last, every[:, -keep:], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_taps_show_what_the_modules_return(
    export: Callable[[str], tuple[Model, Artifact]], name: str
) -> None:
    model, artifact = export(name)
    torch_engine: Any = backends.load("torch")(EngineRequest(facts=model.facts, module=model.module))
    engine: Any = backends.load("onnxruntime")(EngineRequest(facts=model.facts, artifact=artifact))
    shared = [one for one in engine.tap_names() if one in set(torch_engine.tap_names())]
    assert {"model.layers.0", "model.layers.1.mlp.gate_proj", "model.layers.0.self_attn"} <= set(shared)
    ids = np.arange(3, 20)[None]
    ours, theirs = engine.taps(ids, shared), torch_engine.taps(ids, shared)
    for one in shared:
        np.testing.assert_allclose(ours[one], theirs[one], atol=2e-4, rtol=2e-4, err_msg=one)
    engine.close()


def test_genai_config_shares_the_buffer(export: Callable[[str], tuple[Model, Artifact]]) -> None:
    for name in ("llama", "gpt2"):
        config = json.loads(export(name)[1].file("genai_config.json").read_text())
        assert config["search"]["past_present_share_buffer"] is True
        assert ("position_ids" in config["model"]["decoder"]["inputs"]) == (name == "gpt2")


# Falling back -----------------------------------------------------------------------------------


def bloom() -> nn.Module:
    return make_family("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4})


def latent() -> nn.Module:
    sizes = {
        **SIZES, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
        "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    return make_family("deepseek_v3", sizes)


def changing_angles() -> nn.Module:
    # Angles that grow with the text: no table by position can hold them.
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return make_family("llama", {**SIZES, "rope_parameters": rope, "max_position_embeddings": 64})


def test_what_cannot_be_expressed_falls_back_to_the_portable_graph_and_says_why(tmp_path: Path) -> None:
    _, artifact = fused(tiny_lstm(), tmp_path / "out")
    said = artifact.manifest["formats"]["onnx"]
    assert said["target"] == "portable"
    assert "TinyLstm is a module of its own" in said["fallback"]
    assert (
        f"not the one that was asked for, because {said['fallback']}"
        in artifact.file("README.md").read_text()
    )
    assert {node.domain for node in load_graph(artifact).node} == {""}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tiny_gpt, "TinyGpt is a module of its own"),
        (bloom, "BloomForCausalLM is not written against transformers' attention interface"),
        (latent, "latent attention"),
        # No table by position can hold these.
        (changing_angles, "depend on the length of the text"),
    ],
)
def test_reasons_of_a_fallback(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(InexpressibleError, match=reason):
        fused_export.fused_graph(as_decoder(make()), context=128, opset=21)


def test_a_misunderstood_model_is_caught_before_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    true_probe = fused_export.probe

    def wrong(*args: Any, **kwargs: Any) -> Any:
        plan = true_probe(*args, **kwargs)
        return replace(plan, layers={n: replace(one, scale=2 * one.scale) for n, one in plan.layers.items()})

    monkeypatch.setattr(fused_export, "probe", wrong)
    with pytest.raises(InexpressibleError, match="its logits differ by"):
        fused_export.fused_graph(as_decoder(make_family("llama", SIZES)), context=128, opset=21)


def test_an_accuracy_level_needs_the_dialect_that_has_one(tmp_path: Path) -> None:
    model = Model.from_module(tiny_llama())
    with pytest.raises(UnsupportedOptionError, match="accuracy_level is 3"):
        Exporter("onnx", target="onnxruntime", accuracy_level=3).export(model, tmp_path / "out")
    with pytest.raises(UnsupportedOptionError, match="the target asked for is 'portable'"):
        Exporter("onnx", accuracy_level=4).export(model, tmp_path / "out")


# The model is only read -------------------------------------------------------------------------


def everything(module: nn.Module) -> dict[str, Any]:
    """Describe all that an export could leave behind on a module."""
    return {
        path: (type(part), sorted(vars(part)), part.training, sorted(part._forward_hooks))
        for path, part in module.named_modules()
    } | {"config": (module.config.to_dict(), module.config._attn_implementation)}  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    module = make_family("qwen3", FAMILIES["qwen3"][0])
    before, values = everything(module), {name: one.clone() for name, one in module.state_dict().items()}
    if fails:

        def failing(*_args: Any, **_kwargs: Any) -> NoReturn:
            raise OSError("no room")

        monkeypatch.setattr(fused_export, "tidy", failing)
        with pytest.raises(OSError, match="no room"):
            fused(module, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        fused(module, tmp_path / "out")
    assert everything(module) == before
    assert all(torch.equal(one, values[name]) for name, one in module.state_dict().items())
    if not fails:
        # No second body is kept alive.
        gc.collect()
        shared = module.model.embed_tokens.weight  # type: ignore[union-attr]
        bodies = [one for one in gc.get_objects() if type(one) is type(module)]
        assert [one for one in bodies if one.model.embed_tokens.weight is shared] == [module]


def test_another_thread_can_run_the_model_meanwhile() -> None:
    module = make_family("llama", SIZES)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = module(ids).logits
    stop, wrong = threading.Event(), []
    runs = 0

    def run() -> None:
        nonlocal runs
        while not stop.is_set():
            with torch.no_grad():
                # torch's flag of a trace is global, and transformers masks otherwise where it is set.
                if not torch.allclose(module(ids).logits, expected, atol=1e-4):
                    wrong.append("other logits")
            runs += 1

    decoder = as_decoder(module)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        fused_export.fused_graph(decoder, context=128, opset=21)
    finally:
        stop.set()
        thread.join()
    assert runs > 2
    assert not wrong
