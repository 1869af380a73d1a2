"""The harness's own model for transformers, and tasks of each kind with local data."""

import json
from pathlib import Path
from typing import Any


def hf_model(folder: Path) -> Any:
    """Open a folder as the harness does by itself."""
    from lm_eval.models.huggingface import HFLM

    from lmopt.interop.tasks import offline

    with offline():  # it asks the hub for the folder's revision
        return HFLM(str(folder), device="cpu", dtype="float32", batch_size=3)


def write_tasks(folder: Path, data: dict[str, list[dict[str, Any]]]) -> Path:
    """Write one task of each kind; `data` has the items of `choice`, `lastword`, `rolling` and `writing`.

    Nothing in it needs a hub: the data are JSON files beside the tasks.
    """
    kinds = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "lastword": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": " {{word}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "writing": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n\n", "."], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, items in data.items():
        file = folder / f"{name}.json"
        file.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
        task = {
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            **({} if name != "choice" else {"fewshot_split": "test"}),
            **kinds[name],
            "metadata": {"version": 1.0},
        }
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")
    return folder
