"""A tiny model as a Hugging Face folder, for tests that run lmopt in a process of its own; and the distributions."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]

TEXT = "the cat sat on the mat and the dog ran to the door of the old house by the sea"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded two-layer Llama with a word tokenizer, saved by transformers itself."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *sorted(set(TEXT.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        # Larger than an initialisation would be: the logits of two engines must not tie.
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.4)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def build(missing: Callable[[str], NoReturn]) -> Callable[[Path, str, Path], Path]:
    """Builds the `"wheel"` or the `"sdist"` of a source folder into an empty folder."""
    if importlib.util.find_spec("hatchling") is None:
        missing(f"building lmopt needs hatchling; install it: {sys.executable} -m pip install hatchling")

    def build(source: Path, kind: str, folder: Path) -> Path:
        command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
        return next(one for one in folder.iterdir() if one.name.endswith((".whl", ".tar.gz")))

    return build


@pytest.fixture(scope="session")
def wheel(build: Callable[[Path, str, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that would be published."""
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))
