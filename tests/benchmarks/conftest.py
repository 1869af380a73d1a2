"""Where the benchmarks are, and a tiny model for them."""

import sys
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from lmopt.testing.models import VOCAB_SIZE, tiny_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sys.path.insert(0, str(BENCHMARKS / "peers"))


@pytest.fixture(scope="session")
def benchmarks() -> Path:
    """Folder of the scripts."""
    return BENCHMARKS


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a Hugging Face folder whose words are `w0 .. w96`."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_llama().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough words for every round."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(f"w{3 + (n * n * 7 + n) % 90}" for n in range(3000)), encoding="utf-8")
    return file
