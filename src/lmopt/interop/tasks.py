"""Run tasks of lm-evaluation-harness on a runtime: no connection unless it is asked for."""

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from lmopt.errors import DownloadError, InputError, NotInstalledError, UnsafeArtifactError
from lmopt.registry import pip_line
from lmopt.runtime import Runtime

# What each library looks at before it connects.
_OFFLINE: Final = {
    "huggingface_hub.constants": ("HF_HUB_OFFLINE",),
    "datasets.config": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
    "evaluate.config": ("HF_EVALUATE_OFFLINE",),
}


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What one task measured.

    Attributes:
        task: Its name, or that of a group of tasks.
        metrics: Name of the metric, with its filter (`"acc"`, `"exact_match,strict-match"`), to its value.
        stderr: Name to standard error over the items; lacks those that have none.
        higher_is_better: Name to the direction, as far as the task says.
        items: Items that were scored.
        version: Version of the task's definition: other versions do not compare.
        shots: Solved examples in front of each item.
    """

    task: str
    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    higher_is_better: Mapping[str, bool]
    items: int
    version: str
    shots: int


def evaluate_tasks(
    runtime: Runtime,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    chat: bool = False,
    allow_network: bool = False,
    trust: bool = False,
    seed: int = 1234,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[TaskResult]:
    """Measure a model on tasks of lm-evaluation-harness.

    Args:
        runtime: The model, on any engine; it needs a tokenizer.
        tasks: Names of tasks or groups, patterns with `*`, or paths of task files (`.yaml`).
        limit: Take only so many items of each task, from its start.
        num_fewshot: Solved examples in front of each item; default: the task's own number.
        include_path: Folder with task files of one's own, which win over the harness's. A task file may name
            Python code beside it, which then runs.
        batch_size: Most rows in one call of the engine.
        chat: Write each item as a conversation, by the model's chat template.
        allow_network: Fetch data sets that are not on this machine. By default nothing is opened, and a
            task whose data are missing is an error.
        trust: Run tasks that execute code which the model has written.
        seed: Chooses the solved examples.
        progress: Called with the kind of request, the requests done and their total.

    Returns:
        One result a task, in the order of the names, and one a group.

    Raises:
        NotInstalledError: lm-evaluation-harness is missing.
        InputError: There is no such task.
        DownloadError: A task's data are not on this machine and may not be fetched, or could not be.
        UnsafeArtifactError: A task runs what the model writes, and `trust` is not given.
    """
    with offline(not allow_network):
        return _evaluate(
            runtime, tasks, include_path, allow_network,
            model={"batch_size": batch_size, "progress": progress},
            options={
                "limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": chat,
                "fewshot_random_seed": seed, "confirm_run_unsafe_code": trust,
            },
        )  # fmt: skip


def _evaluate(
    runtime: Runtime,
    tasks: Sequence[str],
    include_path: str | Path | None,
    allow_network: bool,
    *,
    model: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[TaskResult]:
    # Here, not at the top: it raises where the harness is missing.
    from lmopt.interop.lm_eval import LmoptLM

    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        extra = pip_line('"lmopt[eval]"')
        raise NotInstalledError(f"lm-evaluation-harness is not whole in this Python: {extra}") from error
    lm = LmoptLM(runtime=runtime, **model)
    manager = _manager(TaskManager, tasks, include_path)
    names = _known(manager, tasks)
    try:
        found = simple_evaluate(
            model=lm, tasks=names, task_manager=manager, log_samples=False, bootstrap_iters=1000, **options
        )
    except ValueError as error:
        if "marked as unsafe" not in str(error):
            raise
        raise UnsafeArtifactError(
            f"{', '.join(names)}: a task runs code that the model has written. Add --trust to let it "
            "(evaluate_tasks(..., trust=True)), in a container without anything that matters."
        ) from error
    except (ConnectionError, FileNotFoundError) as error:
        # The hub's own offline error is a ConnectionError; `datasets` reports an unknown one as a missing file.
        way = (
            "Is the machine connected?"
            if allow_network
            else "lmopt opens no connection unless asked: add --allow-network (evaluate_tasks(..., "
            "allow_network=True)), or point the task's data_files to files on this machine"
        )
        raise DownloadError(
            f"data of {', '.join(names)} are not on this machine ({error}). {way}."
        ) from error
    return _results(found)


def _manager(kind: Any, tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Index the folder's own tasks; the harness's thousands, which take seconds, only where needed."""
    if include_path is None:
        return kind()
    if not Path(include_path).is_dir():
        raise InputError(f"{include_path} is no folder; give one that holds task files (.yaml).")
    own = kind(include_path=str(include_path), include_defaults=False)
    if all(_is_file(name) or own.match_tasks([name]) for name in tasks):
        return own
    return kind(include_path=str(include_path))


def _known(manager: Any, tasks: Sequence[str]) -> list[str]:
    """Resolve names and patterns.

    Raises:
        InputError: One matches no task.
    """
    names: list[str] = []
    for one in tasks:
        matching = [one] if _is_file(one) else manager.match_tasks([one])
        if not matching:
            near = [name for name in manager.all_tasks if one.lower()[:4] in name.lower()][:8]
            hint = f" Near it: {', '.join(near)}." if near else ""
            raise InputError(f"no task is called {one!r}.{hint} All of them: lm_eval ls tasks")
        names += [name for name in matching if name not in names]
    if not names:
        raise InputError("no task is given; name one, such as lambada_openai.")
    return names


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _results(found: Mapping[str, Any]) -> list[TaskResult]:
    results = []
    for task, values in found["results"].items():
        metrics: dict[str, float] = {}
        errors: dict[str, float] = {}
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            # `alias`, `name` and counts stand beside the metrics, without a comma.
            if not comma or not isinstance(value, int | float):
                continue
            name = metric.removesuffix("_stderr") + ("" if filtered == "none" else f",{filtered}")
            (errors if metric.endswith("_stderr") else metrics)[name] = float(value)
        better = found.get("higher_is_better", {}).get(task, {})
        results.append(
            TaskResult(
                task,
                metrics,
                errors,
                {name: up for name, up in better.items() if up is not None},
                int(found.get("n-samples", {}).get(task, {}).get("effective", values.get("sample_len") or 0)),
                str(found.get("versions", {}).get(task, "")),
                int(found.get("n-shot", {}).get(task, 0) or 0),
            )
        )
    return results


@contextlib.contextmanager
def offline(wanted: bool = True) -> Iterator[None]:
    """Keep Hugging Face's libraries from connecting, whether they are imported already or not.

    Args:
        wanted: `False` changes nothing.
    """
    if not wanted:
        yield
        return
    # Imported first: each reads its variable once, and would stay offline for good.
    loaded = {name: module for name in _OFFLINE if (module := _imported(name)) is not None}
    with contextlib.ExitStack() as undo:
        for variable in (
            "HF_HUB_OFFLINE",
            "HF_DATASETS_OFFLINE",
            "HF_EVALUATE_OFFLINE",
            "TRANSFORMERS_OFFLINE",
        ):
            undo.callback(_restore, variable, os.environ.get(variable))
            os.environ[variable] = "1"  # for processes that a task starts
        for module_name, module in loaded.items():
            for name in _OFFLINE[module_name]:
                undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, True)
        if (datasets := _imported("datasets")) is not None:
            undo.callback(setattr, datasets, "load_dataset", datasets.load_dataset)
            datasets.load_dataset = _without_urls(datasets.load_dataset)  # type: ignore[attr-defined]
        yield


def _without_urls(load: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse data files by their address: these switches stop what is fetched from the hub, and nothing else."""

    def load_dataset(*args: Any, **options: Any) -> Any:
        if urls := re.findall(r"\b(?!file:)\w+://[^'\"\s]+", repr((args, options))):
            raise ConnectionError(f"its data lie at {urls[0]}")
        return load(*args, **options)

    return load_dataset


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _restore(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
