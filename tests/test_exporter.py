"""Export: every family runs the same on both engines, and nothing wrong is ever published."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import nn

from lmopt.artifact import Artifact
from lmopt.contracts import ExportRequest
from lmopt.errors import (
    ArtifactExistsError,
    ExportError,
    ParityError,
    UnknownPluginError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.evaluation import TOLERANCES, ParityReport
from lmopt.exporter import Exporter
from lmopt.model import Model
from lmopt.registry import exporters
from lmopt.runtime import Runtime
from lmopt.spec import ExporterSpec
from lmopt.testing.models import CONTEXT_LENGTH, tiny_gpt, tiny_llama, tiny_lstm

VOCAB = 99
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT_SIZES = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
WINDOW = {"sliding_window": 8}
MIXED = {**WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}

# The families that lmopt promises; any other is expected to work and a few are tried below.
FAMILIES: dict[str, Mapping[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 16},
    "gemma3_text": {**SIZES, **MIXED},
    "mistral": {**SIZES, **WINDOW},
    "phi3": SIZES,
    "gpt2": GPT_SIZES,
    "gpt_neox": {**SIZES, "rotary_pct": 0.25},
    "olmo2": SIZES,
    "stablelm": SIZES,
    "qwen3_moe": {**SIZES, **EXPERTS},
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MORE_FAMILIES: dict[str, Mapping[str, Any]] = {
    "falcon": {**SIZES, "alibi": False, "new_decoder_architecture": False},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_oss": {**SIZES, **WINDOW, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gptj": {**GPT_SIZES, "rotary_dim": 4},
    "gemma": {**SIZES, "head_dim": 16},
    "gemma2": {**SIZES, **MIXED},
    "cohere": SIZES,
    "granite": SIZES,
    "phi": SIZES,
    "starcoder2": SIZES,
    "smollm3": SIZES,
    "deepseek_v3": {**SIZES, **LATENT},
}
# These stand for the rest in a normal run: windows, learned positions, partly rotated heads, experts, ALiBi, attention
# sinks. Seven of the others leave in ONNX Runtime's dialect there (tests/backends/torch/test_export_fused.py).
IN_A_NORMAL_RUN = ("gemma3_text", "gpt2", "gpt_neox", "qwen3_moe", "bloom", "gpt_oss", "own_lstm", "own_gpt")


def make_family(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    """Build a random model whose logits spread, so that a wrong one cannot pass by luck."""
    config = transformers.AutoConfig.for_model(name, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for weight in module.parameters():
            with torch.no_grad():
                if weight.dim() > 1:
                    weight.normal_(0, 0.2)
                elif not weight.any():
                    weight.normal_(0, 0.1)
    return module


def make(name: str) -> nn.Module:
    own = {"own_gpt": tiny_gpt, "own_lstm": tiny_lstm, "own_llama": tiny_llama}
    return own[name]() if name in own else make_family(name, {**FAMILIES, **MORE_FAMILIES}[name])


def make_model(name: str) -> Model:
    # A module of one's own says nowhere how many positions it has.
    return Model.from_module(make(name), context_length=CONTEXT_LENGTH if name == "own_gpt" else None)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Model, Artifact]]:
    """Export a tiny model by name, once for all tests of this file."""
    done: dict[str, tuple[Model, Artifact]] = {}

    def get(name: str) -> tuple[Model, Artifact]:
        if name not in done:
            model = make_model(name)
            done[name] = model, Exporter("onnx").export(model, tmp_path_factory.mktemp("export") / name)
        return done[name]

    return get


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prompts(vocab: int) -> list[list[int]]:
    """Rows of 3, 21 and 11 tokens: below and beyond a window of 8."""
    rng = np.random.default_rng(5)
    return [rng.integers(3, vocab, size).tolist() for size in (3, 21, 11)]


def read_again(module: nn.Module, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens by whole forward passes of the author's own module: no cache, mask or padding."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            result = module(torch.tensor([ids]))
        logits = result.logits if hasattr(result, "logits") else result[0]
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def same_tokens_everywhere(model: Model, artifact: Artifact) -> None:
    rows = prompts(model.facts.vocab_size)
    expected = [read_again(model.module, row, 10) for row in rows]
    for backend, source in (("torch", model), ("onnxruntime", artifact)):
        with Runtime(source, backend=backend) as runtime:
            together = runtime.generate(rows, max_new_tokens=10, eos_token_id=None, pad_token_id=None)
        assert [one.token_ids for one in together] == expected, backend
    assert len({tuple(row) for row in expected}) == 3


# Families ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in IN_A_NORMAL_RUN else pytest.mark.sweep)
        for name in [*FAMILIES, *MORE_FAMILIES, "own_lstm", "own_gpt"]
    ],
)
def test_a_family_passes_the_gate_and_gives_the_authors_tokens_on_both_engines(
    export: Callable[[str], tuple[Model, Artifact]], name: str
) -> None:
    model, artifact = export(name)
    same_tokens_everywhere(model, artifact)
    parity = artifact.manifest["parity"]["onnx"]
    assert parity["backend"] == "onnxruntime"
    assert {"prefill", "greedy"} < set(parity["cases"])


# The graph --------------------------------------------------------------------------------------


def load_graph(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(str(artifact.file("model.onnx")), load_external_data=False)


def boundary(values: Any) -> dict[str, tuple[int | str, ...]]:
    return {
        one.name: tuple(axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim)
        for one in values
    }


def cache(axis: str, name: str) -> dict[str, tuple[int | str, ...]]:
    return {
        f"{name}.{layer}.{part}": ("batch_size", 2, axis, 8) for layer in (0, 1) for part in ("key", "value")
    }


ROWS = ("batch_size", "sequence_length")
LSTM_STATE = (2, "batch_size", 32)
GPT_STATE = ("batch_size", 4, "past_sequence_length", 8)
GPT_AFTER = ("batch_size", 4, "total_sequence_length", 8)
MASKED = {
    "input_ids": ROWS,
    "attention_mask": ("batch_size", "total_sequence_length"),
    "position_ids": ROWS,
}
BOUNDARIES = {
    "own_llama": (
        MASKED | cache("past_sequence_length", "past_key_values"),
        {"logits": (*ROWS, 97)} | cache("total_sequence_length", "present"),
    ),
    "own_gpt": (
        MASKED | {f"past_state.{n}": GPT_STATE for n in range(4)},
        {"logits": (*ROWS, 97)} | {f"present_state.{n}": GPT_AFTER for n in range(4)},
    ),
    # torch itself writes the sample's length into the shapes of an LSTM's outputs.
    "own_lstm": (
        {"input_ids": ROWS} | {f"past_state.{n}": LSTM_STATE for n in range(2)},
        {"logits": (*ROWS, 97)} | {f"present_state.{n}": LSTM_STATE for n in range(2)},
    ),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_inputs_and_outputs_have_the_fields_names_and_their_true_axes(
    export: Callable[[str], tuple[Model, Artifact]], name: str
) -> None:
    graph = load_graph(export(name)[1]).graph
    assert (boundary(graph.input), boundary(graph.output)) == BOUNDARIES[name]


@pytest.mark.parametrize("name", ["own_llama", "own_gpt", "own_lstm", "qwen3_moe"])
def test_the_portable_dialect_is_plain_onnx_with_its_weights_beside_it(
    export: Callable[[str], tuple[Model, Artifact]], name: str
) -> None:
    _, artifact = export(name)
    loaded = load_graph(artifact)
    assert [one.domain for one in loaded.opset_import] == [""]
    assert not loaded.functions
    assert {node.domain for node in loaded.graph.node} == {""}
    outside = [one for one in loaded.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for one in outside for entry in one.external_data if entry.key == "location"} == {
        "model.onnx.data"
    }
    inside = [one for one in loaded.graph.initializer if one.data_location != onnx.TensorProto.EXTERNAL]
    assert all(len(one.raw_data) <= 1024 for one in inside)
    # The weights are there once: nothing was copied by folding.
    weights = sum(one.numel() * 4 for one in make(name).parameters())
    assert artifact.file("model.onnx.data").stat().st_size < 1.2 * weights + 8192
    onnx.checker.check_model(str(artifact.file("model.onnx")), full_check=True)


def test_genai_config_describes_the_graph(export: Callable[[str], tuple[Model, Artifact]]) -> None:
    _, artifact = export("own_llama")
    model = json.loads(artifact.file("genai_config.json").read_text())["model"]
    assert {name: model[name] for name in ("type", "vocab_size", "context_length", "eos_token_id")} == {
        "type": "llama",
        "vocab_size": 97,
        "context_length": 128,
        "eos_token_id": 2,
    }
    decoder = model["decoder"]
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [decoder[name] for name in sizes] == [8, 32, 4, 2, 2]
    graph = load_graph(artifact).graph
    said = {*decoder["inputs"].values(), *decoder["outputs"].values()}
    expanded = {name.replace("%d", str(layer)) for name in said for layer in (0, 1)}
    assert expanded == {one.name for one in (*graph.input, *graph.output)}


def test_the_manifest_says_what_was_done(export: Callable[[str], tuple[Model, Artifact]]) -> None:
    model, artifact = export("own_llama")
    manifest = artifact.manifest
    assert artifact.formats == ("onnx",)
    assert manifest["formats"]["onnx"]["opset"] == load_graph(artifact).opset_import[0].version
    assert manifest["formats"]["onnx"]["dtype"] == "float32"
    assert manifest["source"]["fingerprint"] == model.fingerprint()
    assert manifest["versions"]["torch"] == version("torch")
    assert artifact.facts == model.facts
    for name in ("model.onnx", "model.onnx.data", "config.json", "generation_config.json"):
        assert name in manifest["files"]
    card = artifact.file("README.md").read_text()
    assert "prefill" in card
    assert "LlamaForCausalLM" in card
    assert f"- Dialect of `onnx`: `portable`, opset {manifest['formats']['onnx']['opset']}\n" in card


def test_an_older_opset_can_be_asked_for(tmp_path: Path) -> None:
    artifact = Exporter("onnx", opset=18).export(Model.from_module(tiny_lstm()), tmp_path / "out")
    assert load_graph(artifact).opset_import[0].version == 18


@pytest.mark.parametrize("name", ["own_llama", "own_gpt"])
def test_the_model_is_left_as_it_was(tmp_path: Path, name: str) -> None:
    module = make(name)
    for weight in module.parameters():
        weight.requires_grad_(True)
    model = Model.from_module(module, context_length=CONTEXT_LENGTH)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        result = module(ids)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    attention = getattr(module, "config", None) and module.config._attn_implementation
    own = {path: sorted(vars(part)) for path, part in module.named_modules()}
    gradients, config = torch.is_grad_enabled(), dict(model.config)

    Exporter("onnx").export(model, tmp_path / "out")

    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(weight.requires_grad for weight in module.parameters())
    assert (getattr(module, "config", None) and module.config._attn_implementation) == attention
    assert {path: sorted(vars(part)) for path, part in module.named_modules()} == own
    assert (torch.is_grad_enabled(), dict(model.config)) == (gradients, config)
    with torch.no_grad():
        again = module(ids)
    assert torch.equal(result[0], again[0])


# The gate ---------------------------------------------------------------------------------------

# What the fake exporter below hands out: the folder of a good export, and the module to damage.
DAMAGE: dict[str, Any] = {}


def export_damaged(request: ExportRequest) -> Mapping[str, Any]:
    """Copy a good export of the same model, then scale the weight of one module."""
    good: Artifact = DAMAGE["good"]
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(good.path / name, request.folder / name)
    if DAMAGE["module"]:
        scale_weight(request.folder, good, DAMAGE["module"], DAMAGE["factor"])
    DAMAGE["calls"] = DAMAGE.get("calls", 0) + 1
    return dict(good.manifest["formats"]["onnx"])


def scale_weight(folder: Path, good: Artifact, module: str, factor: float) -> None:
    loaded = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    graph = loaded.graph
    weights = {one.name: one for one in graph.initializer if len(one.dims) > 1}
    makers = {name: node for node in graph.node for name in node.output}
    taps = dict(good.manifest["formats"]["onnx"]["taps"])
    node = makers["logits" if module in ("lm_head", "head") else taps[module]]
    # Where a bias is added, the weight is one operator before.
    while not any(name in weights for name in node.input):
        node = makers[node.input[0]]
    weight = next(weights[name] for name in node.input if name in weights)
    place = {entry.key: entry.value for entry in weight.external_data}
    data = np.memmap(
        folder / place["location"],
        np.float32,
        "r+",
        offset=int(place["offset"]),
        shape=(int(place["length"]) // 4,),
    )
    data *= np.float32(factor)
    data.flush()


@pytest.fixture
def damaged(export: Callable[[str], tuple[Model, Artifact]]) -> Iterator[Callable[..., Model]]:
    """Make `Exporter("damaged")` write a good export with one weight scaled."""

    def use(name: str, module: str = "", factor: float = 1.0) -> Model:
        model, good = export(name)
        DAMAGE.update(good=good, module=module, factor=factor, calls=0)
        return model

    exporters.register(
        ExporterSpec("damaged", f"{__name__}:export_damaged", format="onnx", verify_with="onnxruntime")
    )
    yield use
    exporters.unregister("damaged")
    DAMAGE.clear()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("own_llama", "model.embed_tokens"),
        ("own_llama", "model.layers.0.self_attn.q_proj"),
        ("own_llama", "model.layers.1.self_attn.v_proj"),
        ("own_llama", "model.layers.1.mlp.down_proj"),
        ("own_llama", "lm_head"),
        ("own_gpt", "blocks.1.up"),
        ("own_lstm", "lstm"),
        ("qwen3_moe", "model.layers.0.self_attn.o_proj"),
    ],
)
def test_one_weight_scaled_by_a_percent_is_refused(
    damaged: Callable[..., Model], tmp_path: Path, name: str, module: str
) -> None:
    model = damaged(name, module, 1.01)
    with pytest.raises(ParityError) as caught:
        Exporter("damaged").export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    report = caught.value.report
    assert isinstance(report, ParityReport)
    assert not report.ok
    message = str(caught.value)
    assert report.worst.case in message
    assert "prefill" in message
    assert module in message


def test_the_undamaged_copy_passes(damaged: Callable[..., Model], tmp_path: Path) -> None:
    artifact = Exporter("damaged").export(damaged("own_llama"), tmp_path / "out")
    artifact.verify()


def test_a_refused_export_leaves_the_artefact_that_was_there(
    damaged: Callable[..., Model], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    Exporter("damaged").export(damaged("own_llama"), target)
    before = hashes(target)
    model = damaged("own_llama", "lm_head", 1.01)
    with pytest.raises(ParityError):
        Exporter("damaged").export(model, target, overwrite=True)
    assert hashes(target) == before
    assert list(tmp_path.iterdir()) == [target]


def test_the_callers_tolerance_is_the_gates(damaged: Callable[..., Model], tmp_path: Path) -> None:
    loose = TOLERANCES["int4"]
    model = damaged("own_llama", "model.layers.1.mlp.down_proj", 1.01)
    artifact = Exporter("damaged", tolerance=loose).export(model, tmp_path / "out")
    assert artifact.manifest["parity"]["onnx"]["tolerance"]["name"] == "int4"


# The target -------------------------------------------------------------------------------------


def test_an_artefact_is_replaced_only_on_request(damaged: Callable[..., Model], tmp_path: Path) -> None:
    model, target = damaged("own_llama"), tmp_path / "out"
    Exporter("damaged").export(model, target)
    (first := hashes(target)).pop("lmopt.json")
    assert DAMAGE["calls"] == 1
    with pytest.raises(ArtifactExistsError, match="overwrite"):
        Exporter("damaged").export(model, target)
    assert DAMAGE["calls"] == 1  # refused before an hour was spent on it
    other = damaged("own_gpt")
    artifact = Exporter("damaged").export(other, target, overwrite=True)
    assert artifact.facts.architecture == "TinyGpt"
    assert hashes(target)["model.onnx.data"] != first["model.onnx.data"]


def test_what_lmopt_did_not_write_is_never_replaced(damaged: Callable[..., Model], tmp_path: Path) -> None:
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter-1.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ArtifactExistsError):
            Exporter("damaged").export(damaged("own_llama"), target, overwrite=overwrite)
    assert [path.name for path in target.iterdir()] == ["chapter-1.txt"]
    assert DAMAGE["calls"] == 0


STAGES = ["export damaged", "verify damaged"]


def test_progress_tells_each_stage_to_its_end(damaged: Callable[..., Model], tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    Exporter("damaged").export(damaged("own_llama"), tmp_path / "out", progress=lambda *now: told.append(now))
    assert list(dict.fromkeys(stage for stage, _, _ in told))[:2] == STAGES
    for stage in STAGES:
        steps = [(done, total) for name, done, total in told if name == stage]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


# What cannot be exported ------------------------------------------------------------------------


class Branching(nn.Module):
    """Its path depends on values, which no graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 32)

    def forward(self, input_ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, state = self.cell(self.embedding(input_ids), state)
        if hidden.sum() > 0:
            hidden = hidden * 2
        return self.head(hidden), state


def test_a_module_that_branches_on_values_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Branching"):
        Exporter("onnx").export(Model.from_module(Branching()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_no_engine_can_verify_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = Model.from_module(tiny_llama().to(torch.bfloat16))
    with pytest.raises(UnsupportedError, match=r"bfloat16.*dtype='float32'"):
        Exporter("onnx", target="onnxruntime").export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_exporter_names_the_near_one() -> None:
    with pytest.raises(UnknownPluginError, match="Did you mean 'onnx'"):
        Exporter("onxx")


def test_an_unknown_target_names_those_there_are() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"'tensorrt'.*portable"):
        Exporter("onnx", target="tensorrt")


@pytest.mark.parametrize(
    ("options", "said"), [({"opsett": 21}, "opsett.*opset"), ({"opset": 17}, "17"), ({"opset": "21"}, "21")]
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedOptionError, match=said):
        Exporter("onnx", **options).export(Model.from_module(tiny_lstm()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
