"""From what a user calls a model to an engine: which backend, which files, and what is exported when."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from lmopt.artifact import Artifact, Staging, cache_folder, is_artifact
from lmopt.errors import (
    ArtifactNotFoundError,
    CorruptArtifactError,
    LmoptError,
    NotInstalledError,
    UnsupportedError,
)
from lmopt.exporter import Exporter
from lmopt.model import Model
from lmopt.opening import export_for
from lmopt.registry import backends
from lmopt.runtime import Runtime
from lmopt.spec import BackendSpec, Capabilities, Requirement
from lmopt.testing.models import VOCAB_SIZE

TEXT = "w5 w17 w40 w41"


def small_llama() -> torch.nn.Module:
    """One layer: this file exports it several times."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = transformers.LlamaForCausalLM(config).eval()
        for weight in module.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, written by transformers itself."""
    place = tmp_path_factory.mktemp("opening") / "tiny"
    module = small_llama()
    module.generation_config.max_new_tokens = 7
    module.generation_config.eos_token_id = None
    module.save_pretrained(place)
    backend = Backend(models.WordLevel({f"w{n}": n for n in range(VOCAB_SIZE)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model = Model.from_pretrained(folder)
    return Exporter("onnx").export(model, tmp_path_factory.mktemp("opening") / "onnx")


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Count exports, with a cache that is empty at first."""
    monkeypatch.setenv("LMOPT_CACHE", str(tmp_path / "cache"))
    done: list[str] = []
    real = Exporter.write

    def counted(self: Exporter, model: Model, staging: Staging, **options: Any) -> None:
        done.append(model.source)
        real(self, model, staging, **options)

    monkeypatch.setattr(Exporter, "write", counted)
    return done


def tokens(source: Any, **options: Any) -> list[int]:
    with Runtime(source, **options) as runtime:
        return runtime.generate(TEXT).token_ids


# Sources ----------------------------------------------------------------------------------------


def test_every_way_to_name_a_model_gives_the_same_tokens(
    folder: Path, artifact: Artifact, exports: list[str]
) -> None:
    expected = tokens(folder, backend="torch")
    assert len(expected) == 7  # the model's own generation_config.json, in folder and artefact alike
    model = Model.from_pretrained(folder)
    for source in (str(folder), model):
        assert tokens(source, backend="torch") == expected
    for source in (artifact, artifact.path, str(artifact.path)):
        assert tokens(source, backend="onnxruntime") == expected
    assert exports == []
    assert tokens(folder, backend="onnxruntime") == expected


def test_a_model_is_exported_for_an_engine_once(folder: Path, exports: list[str]) -> None:
    first = tokens(folder, backend="onnxruntime")
    assert exports == ["tiny"]
    assert tokens(folder, backend="onnxruntime") == first
    assert tokens(Model.from_pretrained(folder), backend="onnxruntime") == first
    assert exports == ["tiny"]
    entries = [path for path in (cache_folder() / "artifacts").iterdir() if is_artifact(path)]
    assert len(entries) == 1
    kept = Artifact.open(entries[0])
    assert kept.manifest["parity"]["onnx"]["backend"] == "onnxruntime"


def test_other_weights_are_exported_anew(folder: Path, exports: list[str]) -> None:
    model = Model.from_pretrained(folder)
    first = tokens(model, backend="onnxruntime")
    with torch.no_grad():
        model.module.lm_head.weight.copy_(model.module.lm_head.weight.flip(0))
    second = tokens(model, backend="onnxruntime")
    assert len(exports) == 2
    assert second == tokens(model, backend="torch") != first


def test_a_damaged_cache_entry_is_built_again(folder: Path, exports: list[str]) -> None:
    first = tokens(folder, backend="onnxruntime")
    (entry,) = (path for path in (cache_folder() / "artifacts").iterdir() if is_artifact(path))
    flip_a_byte(entry / "model.onnx.data")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert tokens(folder, backend="onnxruntime") == first
    assert len(exports) == 2


def test_the_default_backend_follows_the_source(folder: Path, artifact: Artifact) -> None:
    for source, name in (
        (folder, "torch"),
        (Model.from_pretrained(folder), "torch"),
        (artifact.path, "onnxruntime"),
        (artifact, "onnxruntime"),
    ):
        with Runtime(source) as runtime:
            assert runtime.backend == runtime.report().actual.backend == name
            assert runtime.report().requested["backend"] is None


def test_an_artefact_brings_its_tokenizer_and_facts(folder: Path, artifact: Artifact) -> None:
    with Runtime(artifact.path) as runtime, Runtime(folder) as original:
        assert runtime.facts == original.facts
        assert runtime.tokenizer is not None
        assert runtime.tokenizer.encode(TEXT) == [5, 17, 40, 41]
        assert runtime.report().source == artifact.path.name


def test_a_tokenizer_of_the_callers_wins(artifact: Artifact, folder: Path) -> None:
    backend = Backend(
        models.WordLevel({f"w{n}": (n + 1) % VOCAB_SIZE for n in range(VOCAB_SIZE)}, unk_token="w0")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = Model.from_module(small_llama(), backend).tokenizer
    with Runtime(artifact, tokenizer=own) as runtime, Runtime(artifact) as plain:
        shifted = [6, 18, 41, 42]
        assert runtime.generate(TEXT).token_ids == plain.generate(shifted).token_ids


# What cannot be opened --------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "tokenizer.json", "generation_config.json"]
)
def test_a_tampered_artefact_is_refused_and_the_file_named(
    artifact: Artifact, tmp_path: Path, name: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    flip_a_byte(copy / name)
    with pytest.raises(CorruptArtifactError, match=name):
        Runtime(copy)


def test_a_missing_file_is_refused_and_named(artifact: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    (copy / "model.onnx.data").unlink()
    with pytest.raises(LmoptError, match=r"model\.onnx\.data"):
        Runtime(copy)


def test_a_graph_alone_cannot_run_where_weights_are_needed(artifact: Artifact) -> None:
    with pytest.raises(ArtifactNotFoundError, match="safetensors"):
        Runtime(artifact, backend="torch")


def test_nothing_at_the_path_says_so(tmp_path: Path) -> None:
    for backend in (None, "onnxruntime"):
        with pytest.raises(ArtifactNotFoundError, match="nowhere"):
            Runtime(tmp_path / "nowhere", backend=backend)


def test_precision_is_not_changed_behind_the_callers_back(artifact: Artifact) -> None:
    with pytest.raises(UnsupportedError, match=r"float16"):
        Runtime(artifact, dtype="float16")


def no_engine(request: object) -> None:
    pytest.fail("no engine may be opened")


@pytest.fixture
def register() -> Iterator[Any]:
    """Offer a backend for the time of a test."""
    names: list[str] = []

    def offer(name: str, formats: tuple[str, ...], requires: tuple[Requirement, ...] = ()) -> None:
        names.append(name)
        backends.register(BackendSpec(name, f"{__name__}:no_engine", Capabilities(formats), requires))

    yield offer
    for name in names:
        backends.unregister(name)


def test_a_backend_that_lacks_its_modules_gives_the_pip_line(folder: Path, register: Any) -> None:
    register("absent", ("onnx",), (Requirement("a_module_nobody_has", "absent-engine"),))
    with pytest.raises(NotInstalledError, match=r'-m pip install "absent-engine"'):
        Runtime(folder, backend="absent")


def test_a_format_that_nothing_writes_is_named(folder: Path, register: Any) -> None:
    register("exotic", ("papyrus",))
    with pytest.raises(LmoptError, match="papyrus"):
        Runtime(folder, backend="exotic")


def test_a_manifest_from_elsewhere_is_not_trusted(artifact: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact.path, copy)
    manifest = json.loads((copy / "lmopt.json").read_text())
    manifest["formats"]["onnx"]["files"] = ["../../etc/passwd"]
    (copy / "lmopt.json").write_text(json.dumps(manifest))
    with pytest.raises(LmoptError):
        Runtime(copy)


def test_an_export_in_the_cache_is_that_of_the_tokenizer_too(folder: Path, exports: list[str]) -> None:
    model = Model.from_pretrained(folder)
    with_none = export_for(Model.from_module(model.module), "onnxruntime", "cpu")
    with_one = export_for(Model.from_module(model.module, model.tokenizer), "onnxruntime", "cpu")
    assert len(exports) == 2
    assert (with_one.path / "tokenizer.json").is_file()
    assert not (with_none.path / "tokenizer.json").exists()
