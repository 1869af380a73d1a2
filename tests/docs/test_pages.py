"""The code of the pages runs: every block of README and of the guides, page by page, in a small size.

- The Python blocks of a page share one namespace, in order, and work in a folder of their own.
- Of shell blocks, `lmopt ...` is run; lines that install something are held against pyproject.toml.
- TOML and JSON must parse.
- What cannot run says why, in the line before it: `<!-- not run: it needs a GPU -->`.
"""

import contextlib
import io
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from blocks import Block, blocks, commands
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/index.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "guide").glob("*.md")),
]

# The same code in a small size. The words of a command stand on lines of their own.
SMALLER = [
    (r"max_steps=\d+", "max_steps=4"),
    (r"eval_steps=\d+", "eval_steps=2"),
    (r"warmup_steps=\d+", "warmup_steps=1"),
    (r"max_new_tokens=\d+", "max_new_tokens=4"),
    (r"rows=\d+", "rows=4"),
    (r"tokens=256", "tokens=16"),
    (r"epochs=\d+", "epochs=1"),
    (r"batch_size=256", "batch_size=8"),
    (r"workers=\d+", "workers=1"),
    (r"DropBlocks\(share=0\.2\)", "DropBlocks(share=0.5)"),  # of two blocks
    (r"--(max-steps|max-new-tokens|prompt-tokens|new-tokens)\n\d+", r"--\1\n4"),
    (r"^bench\n", "bench\n--prompt-tokens\n4\n--new-tokens\n4\n--rounds\n1\n"),
    (r"--workers\n\d+", "--workers\n1"),
]

# Artefacts that a page finds where it begins; the others it makes itself.
EXISTING = {
    "README.md": ["lmopt-demo"],
    "docs/guide/deploy.md": ["fast"],
    "docs/guide/generation.md": ["smollm2-onnx"],
    "docs/guide/scaling.md": ["out"],
}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = set(PROJECT["project"]["optional-dependencies"])
KINDS = {"python", "bash", "toml", "json", "text", "dockerfile", "toctree", "eval-rst"}
INSTALLERS = ("python", "pip", "pre-commit", "git", "source", "apt-get", "npm")


# What a page's words take for granted, as code that runs before its first block.
_OPEN = "import lmopt\nmodel = lmopt.Model.from_pretrained('model', dtype='float32')\n"
_HELD_OUT = "held_out = open('held-out.txt').read()\n"
BEFORE = {
    "README.md": _OPEN + "from torch import nn\ntokenizer = model.tokenizer",
    "docs/guide/backends.md": (
        "from lmopt.contracts import EngineRequest\nfrom lmopt.errors import UnsupportedOptionError\n"
        "from lmopt.signature import ArrayState, Signature"
    ),
    "docs/guide/compression.md": _HELD_OUT + "folder = 'quantized'\nfrom lmopt import Exporter, Runtime",
    "docs/guide/distillation.md": _OPEN + _HELD_OUT + "from pathlib import Path\nteacher = student = model",
    "docs/guide/generation.md": (
        "import lmopt\nprompts = ['the old', 'a dog ran']\n"
        "config_a, config_b = lmopt.GenerationConfig(max_new_tokens=2), lmopt.GenerationConfig(max_new_tokens=3)\n"
        "messages = [{'role': 'user', 'content': 'the cat'}]\n"
        "system, questions = 'the old house ', ['a', 'b']\n"
        "question_about_a_text = 'the cat sat on the cat'"
    ),
    "docs/guide/privacy.md": _OPEN + "texts = open('book.txt').read().splitlines()",
    "docs/guide/training.md": (
        _OPEN + "import torch\nfrom lmopt.training import LossValue\ndata = ['the cat sat on the mat. ' * 40]"
    ),
    "docs/guide/trust.md": "import lmopt",
}


def smaller(text: str) -> str:
    """Make code that is shown in full size quick."""
    for pattern, less in SMALLER:
        text = re.sub(pattern, less, text)
    return text


def run_python(block: Block, names: dict[str, Any]) -> None:
    source = "\n" * (block.line - 1) + smaller(block.text)
    code = compile(source, str(block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, names)


def run_shell(block: Block) -> None:
    from lmopt.cli.app import app

    for line in commands(block):
        if line == ["lmopt", "demo"]:
            continue  # it fetches a model; tests/cli runs it on one that is there
        if line[0] == "lmopt":
            words = smaller("\n".join(line[1:])).split("\n")
            if words[0] in {"compress", "export"}:
                # A page that has shown the same in Python shows here how to do it from a shell instead.
                shutil.rmtree(words[2], ignore_errors=True)
            done = CliRunner().invoke(app, words)
            said = f"{block.page.name}:{block.line}: lmopt {' '.join(words)}\n{done.output[-1500:]}"
            # `doctor` reports with 1 what this machine lacks.
            assert done.exit_code in ({0, 1} if words[0] == "doctor" else {0}), said
        else:
            assert line[0] in INSTALLERS, (
                f"{block.page.name}:{block.line}: {line[0]} is neither run nor explained"
            )
            check_installer(block, line)


def check_installer(block: Block, line: list[str]) -> None:
    """Hold what a line installs or runs against what there is."""
    for place, word in enumerate(line):
        if named := re.fullmatch(r"(?:lmopt|\.)\[([\w,-]+)\]", word):
            assert set(named[1].split(",")) <= EXTRAS, f"{block.page.name}:{block.line}: no extra {named[1]}"
        if line[place - 1] == "--group":
            assert word in PROJECT["dependency-groups"]
        if word.endswith(".py") or word.startswith(("examples/", "scripts/")):
            assert (ROOT / word).exists(), f"{block.page.name}:{block.line}: {word} is not there"


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, request: pytest.FixtureRequest) -> None:
    found = list(blocks(ROOT / page))
    runs = [block for block in found if not block.not_run and block.language in {"python", "bash"}]
    if not any(block.language == "python" or "lmopt " in block.text for block in runs):
        # Nothing here needs a model: do not make one.
        for block in runs:
            run_shell(block)
        return
    world = request.getfixturevalue("world")
    for name in EXISTING.get(page, ()):
        shutil.copytree(request.getfixturevalue("artifact_folder"), world / name, dirs_exist_ok=True)
    names: dict[str, Any] = {"__name__": "page"}
    exec(BEFORE.get(page, ""), names)
    for block in runs:
        try:
            run_python(block, names) if block.language == "python" else run_shell(block)
        except Exception as error:
            raise AssertionError(f"{page}:{block.line}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for block in blocks(ROOT / page):
        where = f"{page}:{block.line}"
        assert block.language, f"{where}: name the language behind the fence"
        kind = block.language.strip("{}")
        assert kind in {"python", "bash", "toml", "json", "text", "dockerfile", "toctree", "eval-rst"}, (
            f"{where}: {kind}?"
        )
        for named in re.findall(r"lmopt\[([\w,-]+)\]", block.text):
            assert set(named.split(",")) <= EXTRAS, f"{where}: no extra {named}"
        if kind == "toml":
            tomllib.loads(block.text)
        elif kind == "json":
            json.loads(block.text)
        elif kind == "python":
            compile(block.text, where, "exec")


def test_the_runner_sees_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nwrong = 1 / 0\n```\n\n<!-- not run: it needs a GPU of its own -->\n\n```bash\nfly\n```\n\n"
        "```bash\nlmopt no-such-verb\n```\n\n```bash\npip install 'lmopt[no-such]'\n```\n"
    )
    python, marked, verb, extra = blocks(page)
    assert (python.line, python.language, marked.not_run) == (2, "python", "it needs a GPU of its own")
    with pytest.raises(ZeroDivisionError):
        run_python(python, {})
    for block in (verb, extra):
        with pytest.raises(AssertionError):
            run_shell(block)
    with pytest.raises(AssertionError, match="neither run nor explained"):
        run_shell(marked)
