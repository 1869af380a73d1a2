"""A tiny model with a tokenizer, its export, and ways to call the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from lmopt.cli.app import app
from lmopt.testing.models import VOCAB_SIZE, tiny_llama

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"


def save_tiny(folder: Path, change: Callable[[torch.nn.Module], None] = lambda module: None) -> Path:
    """Save the tiny Llama, after a change, as a Hugging Face folder whose words are `w0 .. w96`."""
    module = tiny_llama()
    with torch.no_grad():
        change(module)
    module.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama as a Hugging Face folder."""
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="session")
def exported(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its ONNX artefact."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    result = call("export", tiny, folder)
    assert result.status == 0, result.stderr
    return str(folder)


@pytest.fixture(scope="session")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ONNX artefact of the same model with one weight of its second layer scaled by 1 %."""
    folder = tmp_path_factory.mktemp("damaged")

    def scale(module: torch.nn.Module) -> None:
        module.model.layers[1].mlp.up_proj.weight.mul_(1.01)

    source = save_tiny(folder / "model", scale)
    assert call("export", source, folder / "out").status == 0
    return str(folder / "out")


def call(*words: object, stdin: str | None = None) -> SimpleNamespace:
    """Run the command line in this process; gives `status`, `stdout`, `stderr` and, of `--json`, `data`."""
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    data: Any = None
    if "--json" in words and result.stdout.strip():
        lines = [json.loads(line, parse_constant=pytest.fail) for line in result.stdout.splitlines()]
        data = lines[0] if len(lines) == 1 else lines
    return SimpleNamespace(
        status=result.exit_code, stdout=result.stdout, stderr=result.stderr, data=data, error=result.exception
    )


@pytest.fixture(scope="session", name="call")
def _call() -> Callable[..., SimpleNamespace]:
    return call
