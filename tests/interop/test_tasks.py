"""Tasks measured on our engines and on transformers give the same figures, and nobody connects unasked."""

import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

import lmopt
from lmopt.cli.app import app
from lmopt.errors import DownloadError, InputError, NotInstalledError, UnsafeArtifactError
from lmopt.interop.tasks import evaluate_tasks, offline

NAMES = ["own_choice", "own_lastword", "own_rolling", "own_writing"]


def theirs_on(model, folder: Path, **options) -> dict[str, dict[str, float]]:
    """What the harness's own model measures on the same tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    options = {"bootstrap_iters": 0, "log_samples": False, **options}
    with offline():
        found = simple_evaluate(model=model, tasks=NAMES, task_manager=manager, **options)
    return {
        task: {
            key.partition(",")[0]: value
            for key, value in values.items()
            if "," in key and "stderr" not in key
        }
        for task, values in found["results"].items()
    }


def test_figures_are_those_of_the_harness_s_own_model(runtime, theirs, tasks: Path) -> None:
    expected = theirs_on(theirs, tasks)
    found = evaluate_tasks(runtime, NAMES, include_path=tasks, batch_size=4)
    assert [one.task for one in found] == NAMES
    for one in found:
        assert dict(one.metrics) == pytest.approx(expected[one.task], rel=1e-4)
    choice = found[0]
    assert (choice.items, choice.shots, choice.version) == (9, 0, "1.0")
    assert choice.higher_is_better == {"acc": True, "acc_norm": True}
    assert choice.stderr["acc"] > 0


def test_limit_and_shots_and_patterns(runtime, theirs, tasks: Path) -> None:
    told = []
    (found,) = evaluate_tasks(
        runtime,
        ["own_ch*"],
        include_path=tasks,
        limit=4,
        num_fewshot=2,
        progress=lambda *one: told.append(one),
    )
    assert (found.task, found.items, found.shots) == ("own_choice", 4, 2)
    assert told[-1] == ("loglikelihood", 16, 16)
    single = evaluate_tasks(runtime, [str(tasks / "choice.yaml")], limit=4)
    assert single[0].shots == 0


def test_a_task_that_needs_the_network_is_an_error_unless_it_is_allowed(runtime, tmp_path: Path) -> None:
    """The fixture `_no_network` fails this test at any attempt to connect."""
    task = {
        "task": "own_far",
        "dataset_path": "somebody/some_data_set",
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "far.yaml").write_text(json.dumps(task))
    with pytest.raises(DownloadError, match="--allow-network"):
        evaluate_tasks(runtime, ["own_far"], include_path=tmp_path)
    url = {**task, "task": "own_url", "dataset_path": "json"}
    url["dataset_kwargs"] = {"data_files": {"test": "https://localhost.invalid/data.json"}}
    (tmp_path / "url.yaml").write_text(json.dumps(url))
    with pytest.raises(DownloadError, match="--allow-network"):
        evaluate_tasks(runtime, ["own_url"], include_path=tmp_path)


def test_offline_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = constants.is_offline_mode()
    with offline():
        assert constants.is_offline_mode()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.is_offline_mode() == before
    assert "HF_HUB_OFFLINE" not in os.environ
    with offline(False):
        assert constants.is_offline_mode() == before


def test_unknown_tasks_and_folders_and_unsafe_ones(runtime, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no task is called 'own_chioce'.*own_choice"):
        evaluate_tasks(runtime, ["own_chioce"], include_path=tasks)
    with pytest.raises(InputError, match="no task is given"):
        evaluate_tasks(runtime, [], include_path=tasks)
    with pytest.raises(InputError, match="no folder"):
        evaluate_tasks(runtime, ["own_choice"], include_path=tmp_path / "none")
    task = json.loads((tasks / "lastword.yaml").read_text())
    (tmp_path / "unsafe.yaml").write_text(json.dumps({**task, "task": "own_unsafe", "unsafe_code": True}))
    with pytest.raises(UnsafeArtifactError, match="--trust"):
        evaluate_tasks(runtime, ["own_unsafe"], include_path=tmp_path)
    assert evaluate_tasks(runtime, ["own_unsafe"], include_path=tmp_path, trust=True, limit=2)


def test_the_command_line(tiny: Path, tasks: Path) -> None:
    def call(*words: object):
        return CliRunner().invoke(app, ["eval", str(tiny), "--include-path", str(tasks), *map(str, words)])

    result = call("--tasks", "own_choice,own_rolling", "--limit", 3, "--num-fewshot", 1, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [one["task"] for one in data["tasks"]] == ["own_choice", "own_rolling"]
    assert data["tasks"][0]["shots"] == 1
    assert data["engine"]["backend"] == "torch"
    shown = call("--tasks", "own_choice", "--limit", 3)
    assert re.search(r"own_choice +acc \(more is better\) +0\.\d+", shown.stdout)
    assert call("--tasks", "no_such_task").exit_code == 2
    assert call("--tasks", "own_choice", "--text", str(tasks / "choice.json")).exit_code == 2


def test_without_the_harness_its_pip_line_is_named() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "import lmopt.interop.tasks as tasks\n"
        "from lmopt.errors import NotInstalledError\n"
        "try:\n    tasks.evaluate_tasks(None, ['x'])\nexcept NotInstalledError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install" in said
    assert "lmopt[eval]" in said
    assert issubclass(NotInstalledError, ImportError)


def multiple_choice(count: int) -> list[dict]:
    """Items that come with the harness's wheel: worked examples of MMLU."""
    prompts = files("lm_eval") / "tasks" / "mmlu" / "flan_cot_fewshot" / "_cot_prompts.json"
    items = []
    pattern = r"\nQ: (.*?)\n\(A\) (.*?) \(B\) (.*?) \(C\) (.*?) \(D\) (.*?)\nA: .*?answer is \(([A-D])\)"
    for text in json.loads(prompts.read_text(encoding="utf-8")).values():
        for found in list(re.finditer(pattern, text, re.DOTALL))[:1]:
            question, *choices, letter = found.groups()
            items.append({"question": question, "choices": choices, "answer": "ABCD".index(letter)})
    return [item for item in items if len(item["question"]) < 300][:count]


def last_words(text: str, count: int) -> list[dict]:
    """LAMBADA's form: a passage, and its last word."""
    sentences = [one.split() for one in re.split(r"[.!?]\s", text) if one.isascii()]
    found = [one for one in sentences if 15 <= len(one) <= 40 and one[-1].isalpha()]
    return [{"text": " ".join(one[:-1]), "word": one[-1]} for one in found[:: len(found) // count][:count]]


@pytest.mark.real_model
def test_figures_of_smollm2(
    smollm2: Path, botchan_text: str, wiki_text: str, tmp_path: Path, full_sweep: bool
) -> None:
    from interop_harness import hf_model, write_tasks

    size = 8 if full_sweep else 1
    data = {
        "choice": multiple_choice(6 * size),
        "lastword": last_words(botchan_text, 6 * size),
        "rolling": [{"text": wiki_text[: 1500 * size]}],
        "writing": [
            {"text": one["text"], "answer": one["word"]} for one in last_words(botchan_text, 3 * size)
        ],
    }
    write_tasks(tmp_path, data)
    expected = theirs_on(hf_model(smollm2), tmp_path)
    # The export takes a minute; on a tiny model both engines are held against the harness in every run.
    for backend in ("torch", "onnxruntime") if full_sweep else ("torch",):
        with lmopt.Runtime(smollm2, backend=backend) as runtime:
            found = evaluate_tasks(runtime, NAMES, include_path=tmp_path)
        assert {one.task: dict(one.metrics) for one in found} == {
            task: pytest.approx(values, rel=1e-4) for task, values in expected.items()
        }
