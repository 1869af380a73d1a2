"""The examples run as they are, in a small size, and become notebooks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run an example in an empty folder and give what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env={**os.environ, "LMOPT_EXAMPLE_QUICK": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_there_is_a_test_for_each_example() -> None:
    assert SCRIPTS == [
        "lstm_tutorial.py",
        "recover_pruned.py",
        "swap_engines.py",
        "train_to_service.py",
        "translation.py",
    ]


def test_the_tutorial_lstm_learns_and_runs_on_both_engines(tmp_path: Path) -> None:
    said = run("lstm_tutorial.py", tmp_path)
    assert "after training" in said
    lines = said.splitlines()
    texts = [line.split(maxsplit=1)[1] for line in lines if line.startswith(("torch  ", "onnxruntime  "))]
    assert len(texts) == 2
    assert texts[0] == texts[1]
    assert [path.name for path in tmp_path.iterdir()] == ["lstm-onnx"]


def test_raw_text_becomes_a_service(tmp_path: Path) -> None:
    said = run("train_to_service.py", tmp_path)
    assert "same text on both engines" in said
    assert "exported and verified: onnx" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lstm-run", "lstm-service"]
    # Run again, it goes on from its last checkpoint: nothing is left to train.
    assert "step 60" not in run("train_to_service.py", tmp_path)


def test_a_pruned_model_recovers_by_distillation(tmp_path: Path) -> None:
    said = run("recover_pruned.py", tmp_path)
    assert "of the divergence removed" in said
    assert "steps: drop_blocks, distill" in said
    assert [path.name for path in tmp_path.iterdir()] == ["recovered"]


@pytest.mark.real_model
@pytest.mark.slow
def test_engines_are_swapped_without_a_change(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, smollm2: Path, full_sweep: bool
) -> None:
    if not full_sweep:
        # Two of its thirty blocks: the whole model is exported in tests/test_smollm2.py.
        import transformers

        short = tmp_path_factory.mktemp("short") / "smollm2"
        shutil.copytree(smollm2, short)
        transformers.AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=2).save_pretrained(short)
        smollm2 = short
    said = run("swap_engines.py", tmp_path, str(smollm2))
    for backend in ("torch", "onnxruntime"):
        assert f"{backend:12} '" in said
        assert (f"{backend:12} ' Paris" in said) == full_sweep
        assert f"{backend}: cpu, float32" in said
    assert "8 identical tokens" in said
    assert list(tmp_path.iterdir()) == []


def test_a_translator_of_ones_own_module(tmp_path: Path) -> None:
    marian = os.environ.get("LMOPT_EXAMPLE_MARIAN")
    said = run("translation.py", tmp_path)
    assert "same tokens on both engines" in said
    if marian:
        assert said.count("As crianças estavam brincando alegremente no jardim.") == 4


def test_its_sum_is_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.syspath_prepend(str(EXAMPLES))
    import translation

    module = translation.Marian(translation.random_weights()).eval()
    ids = torch.tensor([[0, 4, 5, 9, 11, 4]])
    with torch.no_grad():
        whole, _ = module(ids, module.encode(torch.tensor([[5, 9, 31, 7, 0]])))
        state, steps = module.encode(torch.tensor([[5, 9, 31, 7, 0]])), []
        for one in ids[0]:
            logits, state = module(one.view(1, 1), state)
            steps.append(logits[0, 0])
    torch.testing.assert_close(torch.stack(steps), whole[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_is_a_notebook_too(name: str) -> None:
    import jupytext

    notebook = jupytext.read(EXAMPLES / name)
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert kinds.count("code") >= 3
    assert kinds.count("markdown") >= 3
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, name, "exec")
    # Nothing is lost on the way there and back.
    again = jupytext.reads(jupytext.writes(notebook, fmt="ipynb"), fmt="ipynb")
    assert [cell.source for cell in again.cells] == [cell.source for cell in notebook.cells]
