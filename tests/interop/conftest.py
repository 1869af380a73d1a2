"""A tiny model with a byte tokenizer, the same model in the harness's own class, and tasks with local data."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

LENGTH = 96
TEXT = "the cat sat on the mat and the dog ran to the door of the old house by the sea; "


@pytest.fixture(scope="session", autouse=True)
def _own_data_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give data sets that are read a cache that is thrown away."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("datasets") is not None:
            folder = str(tmp_path_factory.mktemp("datasets"))
            patch.setattr(importlib.import_module("datasets.config"), "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Llama of 96 positions that reads any text: byte-level BPE with a few merges."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words.train_from_iterator([TEXT], trainer)
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=64,  # heads of 16: smaller ones have no operator of ONNX Runtime
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        # Larger than an initialisation would be: the logits of two engines must not tie.
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def theirs(tiny: Path) -> Any:
    """The harness's own class for transformers models, on the tiny model, in eager mode."""
    from interop_harness import hf_model

    return hf_model(tiny)


@pytest.fixture(scope="session", params=["torch", "onnxruntime"])
def runtime(request: pytest.FixtureRequest, tiny: Path) -> Iterator[Any]:
    """The tiny model on an engine."""
    import lmopt

    with lmopt.Runtime(tiny, backend=request.param) as opened:
        yield opened


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks for the tiny model."""
    from interop_harness import write_tasks

    words = TEXT.strip().split()
    data = {
        "choice": [
            {"question": " ".join(words[n : n + 5]), "choices": words[n : n + 4], "answer": n % 4}
            for n in range(9)
        ],
        "lastword": [{"text": " ".join(words[:n]), "word": words[n]} for n in range(3, 12)],
        "rolling": [{"text": TEXT * 3}, {"text": "the cat"}, {"text": "café 東京 🙂"}],
        "writing": [{"text": " ".join(words[:n]), "answer": "x"} for n in range(2, 7)],
    }
    return write_tasks(tmp_path_factory.mktemp("tasks"), data)
