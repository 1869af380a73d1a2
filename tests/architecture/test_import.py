"""Importing lmopt, or the spec of any plug-in, is quick because it imports nothing heavy."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

from lmopt.registry import backends, exporters

HEAVY = ["torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers", "tokenizers", "matplotlib"]
HEAVY += ["rich", "typer", "gguf", "safetensors", "numpy", "jinja2", "pip"]


def _imported_by(statement: str) -> set[str]:
    """Run a statement in a fresh interpreter and return the top-level modules that it imported."""
    code = (
        "import json, sys; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_lmopt_imports_the_standard_library_only() -> None:
    imported = _imported_by("import lmopt")
    assert "lmopt" in imported
    assert not imported & set(HEAVY)
    assert imported - {"lmopt"} <= sys.stdlib_module_names


def test_the_public_names_are_listed_without_importing_their_homes() -> None:
    imported = _imported_by("import lmopt; assert 'Model' in dir(lmopt)")
    assert imported - {"lmopt"} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "name", ["Artifact", "GenerationConfig", "LmoptError", "ParityError", "Runtime", "Tokenizer"]
)
def test_a_torch_free_name_imports_no_engine(name: str) -> None:
    imported = _imported_by(f"from lmopt import {name}")
    assert not imported & {"torch", "onnx", "onnxruntime", "transformers", "matplotlib", "rich", "typer"}


def test_the_command_line_starts_without_an_engine() -> None:
    imported = _imported_by("import lmopt.cli")
    assert not imported & {"torch", "onnx", "onnxruntime", "transformers", "matplotlib"}


@pytest.mark.parametrize(
    ("group", "name"),
    [("backends", name) for name in backends.names()] + [("exporters", name) for name in exporters.names()],
)
def test_a_spec_is_light(group: str, name: str) -> None:
    owners = {one.module.partition(".")[0] for one in entry_points(group=f"lmopt.{group}", name=name)}
    imported = _imported_by(f"from lmopt.registry import {group}; {group}.spec({name!r})")
    assert imported - {"lmopt", *owners} <= sys.stdlib_module_names


def test_report_the_time_of_an_import(
    record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The budget is 100 ms. It is shown and recorded, not asserted: another machine is slower or busier."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import lmopt"], capture_output=True, text=True, check=True
    )
    line = next(line for line in done.stderr.splitlines() if re.search(r"\| lmopt$", line))
    milliseconds = int(line.split("|")[1]) / 1000
    record_property("import_lmopt_ms", milliseconds)
    with capsys.disabled():
        sys.stdout.write(f"\nimport lmopt: {milliseconds:.1f} ms\n")
