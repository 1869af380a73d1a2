"""Loading, saving and telling models apart; everything that must not be loaded is refused."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from torch import nn

import lmopt
from lmopt.artifact import Artifact, publish
from lmopt.compression import DropBlocks
from lmopt.errors import (
    ArtifactError,
    ArtifactExistsError,
    ArtifactNotFoundError,
    CorruptArtifactError,
    LmoptError,
    TokenizerError,
    UnsafeArtifactError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.model import Model
from lmopt.testing.models import tiny_lstm
from lmopt.testing.seq2seq import tiny_bart, tiny_t5, tiny_whisper
from lmopt.types import SourceFacts

IDS = torch.tensor([[1, 2, 3, 4]])


def llama(**options: object) -> transformers.LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaConfig(
        **{"vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 96, **sizes, **options}
    )


def gpt2() -> transformers.GPT2Config:
    return transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=48)


def make(config: transformers.PreTrainedConfig, folder: Path, **options: object) -> Path:
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config)
    module.generation_config.eos_token_id = 5
    module.save_pretrained(folder, **options)
    backend = Backend(models.WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w1", eos_token="w5")
    wrapped.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(llama(), tmp_path / "llama")


def edit(path: Path, **fields: object) -> None:
    content = json.loads(path.read_text())
    content.update(fields)
    path.write_text(json.dumps(content))


def logits(module: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return module(ids).logits


# Loading ----------------------------------------------------------------------------------------


def test_a_folder_gives_module_tokenizer_and_facts(folder: Path) -> None:
    model = Model.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model.module), logits(reference))
    assert not model.module.training
    assert model.facts.vocab_size == 64
    assert model.facts.context_length == 96
    assert model.facts.parameters == sum(one.numel() for one in reference.parameters())
    assert model.facts.architecture == "LlamaForCausalLM"
    assert model.tokenizer is not None
    assert model.tokenizer.encode("w3 w4") == [3, 4]
    assert model.tokenizer.apply_chat_template([{"role": "user", "content": "w2"}]) == "w1w2"
    assert model.config["model_type"] == "llama"
    assert model.generation_config["eos_token_id"] == 5
    assert not any(key.startswith("output_") for key in model.generation_config)
    assert model.source == "llama"


def test_context_length_by_another_name_and_tied_weights_counted_once(tmp_path: Path) -> None:
    model = Model.from_pretrained(make(gpt2(), tmp_path / "gpt2"))
    assert model.facts.context_length == 48
    embedding = model.module.transformer.wte.weight
    assert model.module.lm_head.weight is embedding
    stored = safetensors.torch.load_file(tmp_path / "gpt2" / "model.safetensors")
    assert model.facts.parameters == sum(one.numel() for one in stored.values())


def test_a_sharded_folder(tmp_path: Path) -> None:
    folder = make(llama(), tmp_path / "m", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole = make(llama(), tmp_path / "whole")
    assert torch.equal(
        logits(Model.from_pretrained(folder).module), logits(Model.from_pretrained(whole).module)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(folder: Path, dtype: str) -> None:
    model = Model.from_pretrained(folder, dtype=dtype)
    assert {str(one.dtype) for one in model.module.parameters()} == {f"torch.{dtype}"}


def test_auto_keeps_the_files_dtype(tmp_path: Path) -> None:
    make(llama(), tmp_path / "a")
    Model.from_pretrained(tmp_path / "a", dtype="bfloat16").save_pretrained(tmp_path / "b")
    assert next(Model.from_pretrained(tmp_path / "b").module.parameters()).dtype == torch.bfloat16


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="float16"):
        Model.from_pretrained(folder, dtype="int3")


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink()
    assert Model.from_pretrained(folder).tokenizer is None


def test_a_hub_cache_layout_loads(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    shutil.copytree(folder, blobs)
    for file in blobs.iterdir():
        os.symlink(Path("../../blobs") / file.name, snapshot / file.name)
    assert Model.from_pretrained(snapshot).facts.vocab_size == 64


def test_loading_opens_no_connection_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        sys.stderr.write(f'CONNECTS {arguments}'); sys.stderr.flush(); import os; os._exit(9)\n"
        "sys.addaudithook(watch)\n"
        "from lmopt.model import Model\n"
        f"model = Model.from_pretrained({str(folder)!r})\n"
        "import huggingface_hub.constants as hub\n"
        "assert hub.HF_HUB_DISABLE_TELEMETRY\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [path for path in home.rglob("*") if path.is_file()] == []


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/absent/model", "./absent", "../absent", "a/b/c", "absent.gguf", "~/absent", "C:\\x", ""]
)
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(ArtifactNotFoundError, match=r"does not exist.*hub id"):
        Model.from_pretrained(name) if name else Model.from_pretrained(Path("/absent/x"))


def test_a_hub_id_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArtifactNotFoundError, match=r"no file or folder here.*hub") as caught:
        Model.from_pretrained("nobody/nothing", local_files_only=True)
    assert caught.value.__suppress_context__  # twenty frames of an HTTP client


@pytest.mark.parametrize("call", ["Model.from_pretrained('nobody/nothing')", "Runtime('nobody/nothing')"])
def test_a_hub_id_is_asked_for_before_anything_slow_is_imported(tmp_path: Path, call: str) -> None:
    code = (
        "import sys\n"
        "from lmopt import LmoptError, Model, Runtime\n"
        "try:\n"
        f"    {call}\n"
        "except LmoptError as error:\n"
        "    print(type(error).__name__, sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "ArtifactNotFoundError []", done.stderr


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"abcd")
    with pytest.raises(ArtifactError, match="no GGUF"):
        Model.from_pretrained(tmp_path / "x.bin")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match=r"config\.json"):
        Model.from_pretrained(tmp_path)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactNotFoundError, match=r"no weights"):
        Model.from_pretrained(folder)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "model.pth"])
def test_pickles_need_a_grant(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "fired")))
    with pytest.raises(UnsafeArtifactError, match=rf"{name}.*trust=True"):
        Model.from_pretrained(folder)
    assert not (tmp_path / "fired").exists()


def test_a_pickle_beside_safetensors_is_not_read(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "fired")))
    assert Model.from_pretrained(folder).facts.vocab_size == 64
    assert not (tmp_path / "fired").exists()


def test_a_granted_pickle_loads(folder: Path) -> None:
    expected = logits(Model.from_pretrained(folder).module)
    torch.save(safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(Model.from_pretrained(folder, trust=True).module), expected)


CODE = {
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
    "remote auto_map": {"auto_map": {"AutoConfig": "someone/else--config.X"}},
    "nested auto_map": {"text_config": {"deep": [{"auto_map": {"AutoConfig": "x.X"}}]}},
    "attention kernel": {"_attn_implementation_internal": "someone/kernel"},
    "attention kernel by its other name": {"attn_implementation": "someone/kernel"},
    "nested kernel": {"text_config": {"_attn_implementation": "someone/kernel@main"}},
    "expert kernel": {"_experts_implementation": "someone/kernel"},
    "flag": {"trust_remote_code": True},
    "nested flag": {"decoder": {"trust_remote_code": True}},
    "generate": {"custom_generate": "someone/decoding"},
}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("field", CODE)
def test_fields_that_run_code_need_a_grant(folder: Path, tmp_path: Path, field: str, file: str) -> None:
    (folder / "modeling_x.py").write_text(f"import os; os.mkdir({str(tmp_path / 'fired')!r})")
    edit(folder / file, **CODE[field])
    with pytest.raises(UnsafeArtifactError, match="trust=True"):
        Model.from_pretrained(folder)
    assert not (tmp_path / "fired").exists()


def test_granted_code_runs(folder: Path) -> None:
    (folder / "modeling_x.py").write_text(
        "from transformers import LlamaForCausalLM\nclass X(LlamaForCausalLM):\n    mine = True\n"
    )
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"}, architectures=["X"])
    assert Model.from_pretrained(folder, trust=True).module.mine


def test_adapters_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(UnsafeArtifactError, match="adapter"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_links_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / "outside")
    os.symlink(tmp_path / "outside", folder / name)
    with pytest.raises(UnsafeArtifactError, match=name):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd.safetensors", "a\\b.safetensors"])
def test_shards_out_of_the_folder(tmp_path: Path, shard: str) -> None:
    folder = make(llama(), tmp_path / "m", max_shard_size="20KB")
    shutil.copy(next(folder.glob("*.safetensors")), tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(UnsafeArtifactError, match="leads out"):
        Model.from_pretrained(folder)


def test_weights_named_by_the_config_stay_inside(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "model.safetensors", tmp_path / "other.safetensors")
    edit(folder / "config.json", transformers_weights="../other.safetensors")
    with pytest.raises(UnsafeArtifactError, match="leads out"):
        Model.from_pretrained(folder)


def test_tokenizer_files_named_by_the_config_stay_inside(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.../../x.json"])
    with pytest.raises(UnsafeArtifactError, match="leads out"):
        Model.from_pretrained(folder)


# Damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_named(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors"):
        Model.from_pretrained(folder)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(NORM), f"missing: {NORM}"),
        (lambda t: t.pop("lm_head.weight"), r"missing: lm_head\.weight"),
        (lambda t: t.update(surplus=torch.zeros(3)), "not part of the model: surplus"),
        (
            lambda t: t.update({NORM: torch.ones(33)}),
            rf"misshapen: {NORM} \(stored \(33,\), expected \(32,\)\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, change: Callable[..., object], told: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CorruptArtifactError, match=told):
        Model.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model_type": "llama", "model_type": "gpt2"}', '{"a": NaN}']
)
def test_a_malformed_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CorruptArtifactError, match=r"config\.json"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("fields", [{"hidden_size": "big"}, {"num_attention_heads": 0}, {"vocab_size": -1}])
def test_an_absurd_config(folder: Path, fields: dict) -> None:
    edit(folder / "config.json", **fields)
    with pytest.raises(LmoptError):
        Model.from_pretrained(folder)


def test_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="tokenizer"):
        Model.from_pretrained(folder)


# Not language models ----------------------------------------------------------------------------


def test_unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", model_type="nonesuch")
    with pytest.raises(UnsupportedError, match="nonesuch"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart, tiny_whisper])
def test_encoder_decoders_come_back_as_they_were(
    tmp_path: Path, build: Callable[[], torch.nn.Module]
) -> None:
    module = build()
    module.save_pretrained(tmp_path / "hf")
    first = Model.from_pretrained(tmp_path / "hf")
    first.save_pretrained(tmp_path / "ours")
    again = Model.from_pretrained(tmp_path / "ours")
    assert first.facts == again.facts == Artifact.open(tmp_path / "ours").facts
    assert first.facts.source is not None
    assert first.facts.source.start_token_id == module.config.decoder_start_token_id
    assert first.fingerprint() == again.fingerprint()
    assert type(again.module) is type(module)
    described = tmp_path / "ours" / "preprocessor_config.json"
    assert described.exists() == (build is tiny_whisper)
    if described.exists():
        assert json.loads(described.read_text())["feature_size"] == first.facts.source.size
    for model in (first, again):
        for (name, one), other in zip(module.named_parameters(), model.module.parameters(), strict=True):
            assert torch.equal(one, other), name


def test_an_encoder_decoder_that_does_not_say_how_to_begin(tmp_path: Path) -> None:
    module = tiny_t5()
    module.config.decoder_start_token_id = module.generation_config.decoder_start_token_id = None
    module.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="names no decoder_start_token_id"):
        Model.from_pretrained(tmp_path)


def test_a_module_of_ones_own_needs_an_encoder() -> None:
    with pytest.raises(UnsupportedError, match=r"TinyLstm has no method encode"):
        Model.from_module(tiny_lstm(), source=SourceFacts("ids", 0, 10))
    with pytest.raises(UnsupportedOptionError, match="states its own config, vocab_size and source"):
        Model.from_module(tiny_t5(), source=SourceFacts("ids", 0, 10))


def test_what_does_not_take_encoder_decoders_yet_says_so() -> None:
    model = Model.from_module(tiny_t5())
    with pytest.raises(UnsupportedError, match="step 'drop_blocks' does not take encoder-decoders"):
        lmopt.Compressor([DropBlocks(share=0.5)]).compress(model)
    with pytest.raises(UnsupportedError, match="trains models without an encoder so far"):
        lmopt.train(model, ["a text"])
    with pytest.raises(UnsupportedError, match="begin with a source"), lmopt.Runtime(model) as rt:
        rt.perplexity([1, 2, 3])


@pytest.mark.parametrize(
    "kind", ["BertModel", "BertForMaskedLM", "BertLMHeadModel", "ViTModel", "LlamaForSequenceClassification"]
)
def test_models_that_do_not_predict_the_next_token(tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    found = getattr(transformers, kind)
    config = llama() if "Llama" in kind else found.config_class(**sizes)
    found(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="causal"):
        Model.from_pretrained(tmp_path)


def test_a_quantization_that_is_not_known(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "bits": 4})
    with pytest.raises(UnsupportedError, match="bitsandbytes"):
        Model.from_pretrained(folder)


def test_a_quantization_that_is_only_claimed(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CorruptArtifactError, match=r"quantized \(gptq\), but no tensor is"):
        Model.from_pretrained(folder)


# Modules of one's own ---------------------------------------------------------------------------


class Lstm(nn.Module):
    def __init__(self, vocab: int = 40, both: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, 16)
        self.dropout = nn.Dropout(0.9)
        self.lstm = nn.LSTM(16, 16, batch_first=True, bidirectional=both)
        self.head = nn.Linear(32 if both else 16, vocab, bias=False)
        if not both:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor, state: object = None) -> tuple[torch.Tensor, object]:
        hidden, state = self.lstm(self.dropout(self.embedding(input_ids)), state)
        return self.head(hidden), state


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


def test_from_module_finds_the_vocabulary_and_stops_dropout() -> None:
    module = Lstm().train()
    model = Model.from_module(module, config={"n_ctx": 77}, generation_config={"temperature": 0.5})
    assert model.module is module
    assert not module.training
    assert (model.facts.vocab_size, model.facts.context_length) == (40, 77)
    assert model.facts.parameters == 40 * 16 + 2 * 4 * 16 * 16 + 2 * 4 * 16
    assert model.config == {"n_ctx": 77}
    assert model.generation_config == {"temperature": 0.5}
    assert model.tokenizer is None
    assert Model.from_module(Bigram()).facts.vocab_size == 11
    assert Model.from_module(Bigram(), vocab_size=11, context_length=5).facts.context_length == 5


@pytest.mark.parametrize("weight", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_from_module_names_a_weight_that_holds_nan(weight: str) -> None:
    module = transformers.LlamaForCausalLM(llama())
    with torch.no_grad():
        module.get_parameter(weight).view(-1)[3] = torch.nan
    with pytest.raises(
        UnsupportedError, match=rf"LlamaForCausalLM are NaN.*hold NaN: {re.escape(weight)}\. "
    ):
        Model.from_module(module)


def test_nan_without_a_weight_to_blame_is_an_overflow() -> None:
    class Overflowing(Bigram):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids) * torch.inf * 0

    with pytest.raises(UnsupportedError, match="none of its weights is: a value overflows"):
        Model.from_module(Overflowing())


def test_from_module_takes_a_transformers_model(folder: Path) -> None:
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = Model.from_module(module, transformers.AutoTokenizer.from_pretrained(folder))
    loaded = Model.from_pretrained(folder)
    assert model.facts == loaded.facts
    assert model.fingerprint() == loaded.fingerprint()
    assert model.tokenizer is not None
    assert model.tokenizer.bos_token_id == 1


def test_a_module_that_looks_ahead_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedError, match="not causal"):
        Model.from_module(Lstm(both=True))


@pytest.mark.parametrize(
    "result", [lambda ids: ids, lambda ids: torch.zeros(1, 7), lambda ids: "logits", lambda ids: {}]
)
def test_a_module_that_gives_no_logits(result: Callable[[torch.Tensor], object]) -> None:
    class Odd(nn.Module):
        def forward(self, ids: torch.Tensor) -> object:
            return result(ids)

    with pytest.raises(UnsupportedError, match="Odd"):
        Model.from_module(Odd())


def test_own_weights_come_back_into_the_own_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model.from_module(Lstm())
    artifact = model.save_pretrained(tmp_path / "lstm")
    assert artifact.formats == ("safetensors",)
    assert artifact.facts == model.facts
    torch.manual_seed(1)
    other = Model.from_module(Lstm())
    assert other.fingerprint() != model.fingerprint()
    assert other.load_weights(tmp_path / "lstm") is other
    assert other.fingerprint() == model.fingerprint()
    assert other.module.head.weight is other.module.embedding.weight
    assert torch.equal(other.module(IDS)[0], model.module(IDS)[0])
    with pytest.raises(UnsupportedError, match=r"Lstm.*load_weights"):
        Model.from_pretrained(tmp_path / "lstm")
    with pytest.raises(CorruptArtifactError, match="Bigram"):
        Model.from_module(Bigram()).load_weights(tmp_path / "lstm")
    with pytest.raises(CorruptArtifactError, match="does not fit"):
        Model.from_module(Lstm(vocab=41)).load_weights(tmp_path / "lstm")


# Saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [llama(), llama(tie_word_embeddings=True), gpt2()], ids=["untied", "tied", "gpt2"]
)
def test_what_is_saved_is_an_artefact_and_a_hugging_face_model(
    tmp_path: Path, config: transformers.PreTrainedConfig
) -> None:
    model = Model.from_pretrained(make(config, tmp_path / "a"))
    artifact = model.save_pretrained(tmp_path / "b")
    assert artifact.formats == ("safetensors",)
    Artifact.open(tmp_path / "b").verify()
    again = Model.from_pretrained(tmp_path / "b")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again.module), logits(model.module))
    assert torch.equal(logits(theirs), logits(model.module))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "b").encode("w3 w9") == [3, 9]
    assert again.facts == model.facts == artifact.facts
    assert again.generation_config == model.generation_config
    assert again.tokenizer is not None
    assert model.tokenizer is not None
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert again.fingerprint() == model.fingerprint()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "b").iterdir()} == {0o666 & ~_umask()}


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_saving_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(folder)
    first, second = (model.save_pretrained(tmp_path / name).manifest["files"] for name in "ab")
    assert first == second


def test_saving_replaces_only_when_asked(folder: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(folder)
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(ArtifactExistsError):
        model.save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "b", overwrite=True)
    with pytest.raises(ArtifactExistsError):
        model.save_pretrained(folder, overwrite=True)


def test_a_damaged_artefact_is_noticed(folder: Path, tmp_path: Path) -> None:
    Model.from_pretrained(folder).save_pretrained(tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors"):
        Model.from_pretrained(tmp_path / "b")


def test_an_artefact_of_another_format_says_what_it_has(tmp_path: Path) -> None:
    with publish(tmp_path / "onnx") as draft:
        (draft.path / "config.json").write_text("{}")
        draft.manifest["formats"] = {"onnx": {}}
    with pytest.raises(ArtifactNotFoundError, match=r"holds onnx.*lmopt export"):
        Model.from_pretrained(tmp_path / "onnx")
    with pytest.raises(ArtifactNotFoundError, match="holds onnx"):
        Model.from_module(Bigram()).load_weights(tmp_path / "onnx")


# Fingerprint ------------------------------------------------------------------------------------


def test_a_fingerprint_tells_models_apart(folder: Path, tmp_path: Path) -> None:
    first = Model.from_pretrained(folder)
    seen = {first.fingerprint()}
    assert Model.from_pretrained(folder).fingerprint() in seen
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert Model.from_pretrained(moved).fingerprint() in seen
    seen.add(Model.from_pretrained(folder, dtype="bfloat16").fingerprint())
    edit(moved / "config.json", rms_norm_eps=1e-3)
    seen.add(Model.from_pretrained(moved).fingerprint())
    with torch.no_grad():
        first.module.lm_head.weight.data[3, 3] += 1
    seen.add(first.fingerprint())
    with torch.no_grad():
        first.module.lm_head.weight.data[[0, 1]] = first.module.lm_head.weight.data[[1, 0]]
    seen.add(first.fingerprint())
    assert len(seen) == 5
    assert all(len(one) == 64 for one in seen)


def test_a_fingerprint_takes_scalars_and_empty_tensors() -> None:
    module = Bigram()
    module.register_buffer("step", torch.tensor(3))
    module.register_buffer("none", torch.zeros(0, 4))
    model = Model.from_module(module)
    before = model.fingerprint()
    module.step += 1
    assert model.fingerprint() != before


# Real model -------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_smollm2_gives_its_reference_tokens(smollm2: Path) -> None:
    model = Model.from_pretrained(smollm2)
    assert (model.facts.vocab_size, model.facts.context_length) == (49152, 8192)
    assert model.facts.parameters == 134_515_008
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("The capital of France is")
    for expected in (7042, 30, 198, 198, 504, 2988, 314, 42):
        ids.append(int(logits(model.module, torch.tensor([ids]))[0, -1].argmax()))
        assert ids[-1] == expected
