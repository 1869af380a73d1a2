"""A folder in which the pages find what they speak of: a tiny model under all its names, texts, rows."""

import json
import random
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmopt.contracts import ExportRequest

sys.path.insert(0, str(Path(__file__).parent))

TEXT = (
    "the old house by the sea was quiet and the cat sat on the mat while a dog ran to the door because rain fell over "
    "hills where people walked home with bread milk and a small lamp that shone in the dark"
)


def words(count: int, seed: int) -> str:
    """Some sentences."""
    draw = random.Random(seed)
    sentences = []
    while count > 0:
        length = draw.randint(5, 14)
        count -= length
        sentences.append(" ".join(draw.choices(TEXT.split(), k=length)).capitalize() + ".")
    return " ".join(sentences)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Llama of two blocks with a byte tokenizer and a chat template, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces.train_from_iterator([words(2000, 0)], trainer)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.12)
    folder = tmp_path_factory.mktemp("model") / "model"
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def kept_exports() -> dict[str, tuple[Path, Any]]:
    """What was traced and translated, by what it was made of."""
    return {}


@pytest.fixture(autouse=True)
def exported_once(
    kept_exports: dict[str, tuple[Path, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trace and translate equal models once: most pages export the same one, and these are not the tests of that."""
    from lmopt.backends.torch import export_onnx
    from lmopt.backends.torch.saving import fingerprint

    kept, write = kept_exports, export_onnx.export_onnx

    def remembered(request: ExportRequest) -> Any:
        rows = [row.tolist() for row in request.rows]
        model = fingerprint(request.module, request.config)
        key = json.dumps([model, request.target, dict(request.options), rows], default=str)
        if key not in kept:
            folder = tmp_path_factory.mktemp("exported")
            kept[key] = folder, write(replace(request, folder=folder))
        folder, record = kept[key]
        shutil.copytree(folder, request.folder, dirs_exist_ok=True)
        return deepcopy(record)

    monkeypatch.setattr(export_onnx, "export_onnx", remembered)


@pytest.fixture(scope="session")
def artifact_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, exported for ONNX Runtime, with its weights beside."""
    import lmopt

    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    lmopt.Exporter("onnx", "safetensors").export(lmopt.Model.from_pretrained(model_folder), folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages read beside a model."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("book.txt", "text.txt", "held-out.txt", "texts.txt")):
        (folder / name).write_text(
            "\n".join(words(150, 10 * seed + n) for n in range(20 if seed == 0 else 4))
        )
    rows = {
        "more.jsonl": [{"text": words(60, seed)} for seed in range(8)],
        "prompts.jsonl": [{"id": n, "prompt": words(6, n)} for n in range(4)],
        "canaries.jsonl": [{"template": "my door code is {}", "secret": "41"}],
    }
    for name, lines in rows.items():
        (folder / name).write_text("\n".join(json.dumps(line) for line in lines))
    return folder


@pytest.fixture
def world(model_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with the texts, and the model under every name that a page gives it."""
    for name in (
        *("path/or/hub-id", "path/to/model", "my-model", "smollm2-135m", "model", "path"),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ):
        shutil.copytree(model_folder, tmp_path / name, dirs_exist_ok=True)
    for file in texts.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
