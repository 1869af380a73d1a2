"""The example notebooks run, in a small size, and what they show belongs to the code that they show."""

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = FOLDER.parents[1] / "scripts" / "write_notebooks.py"
    spec = importlib.util.spec_from_file_location("write_notebooks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(
    name: str,
    script: ModuleType,
    model_folder: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(texts / "book.txt", tmp_path / "botchan.txt")
    shutil.copy(texts / "held-out.txt", tmp_path / "wiki.txt")
    monkeypatch.setenv("LMOPT_EXAMPLE_QUICK", "1")
    monkeypatch.setenv("LMOPT_EXAMPLE_MODEL", str(model_folder))
    monkeypatch.setenv("LMOPT_EXAMPLE_TEXTS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    (tmp_path / "work").mkdir()
    notebook = script.run(FOLDER / f"{name}.py", tmp_path / "work", timeout_s=300)
    assert any("data" in output for cell in notebook.cells for output in cell.get("outputs", ()))


@pytest.mark.parametrize("name", NAMES)
def test_its_outputs_are_those_of_its_source(name: str, script: ModuleType) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    hint = f"run: python scripts/write_notebooks.py {name}"
    assert notebook.metadata.get("lmopt_source_sha256") == script.source_hash(FOLDER / f"{name}.py"), hint
    kinds = {output.output_type for cell in notebook.cells for output in cell.get("outputs", ())}
    assert "error" not in kinds
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert pictures, hint
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000
    assert "site-packages" not in (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
