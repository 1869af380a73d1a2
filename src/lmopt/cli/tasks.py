"""`lmopt eval --tasks`: tasks of lm-evaluation-harness, on any engine."""

from typing import TYPE_CHECKING, Any

from lmopt.cli.output import Output

if TYPE_CHECKING:
    from lmopt.interop.tasks import TaskResult
    from lmopt.runtime import Runtime


def scores(out: Output, runtime: "Runtime", names: str, **options: Any) -> None:
    """Measure a model on tasks and show the figures.

    Args:
        out: Takes the table.
        runtime: The model.
        names: Tasks, separated by commas.
        **options: As for `lmopt.interop.tasks.evaluate_tasks`.
    """
    from lmopt.interop.tasks import evaluate_tasks

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    with out.progress() as tell:
        found = evaluate_tasks(runtime, wanted, progress=tell, **options)
    engine = runtime.report().actual
    rows = [
        [
            one.task,
            metric + _direction(one, metric),
            f"{value:.4f}",
            f"{one.stderr[metric]:.4f}" if metric in one.stderr else "-",
            f"{one.items:,}",
            str(one.shots),
        ]
        for one in found
        for metric, value in one.metrics.items()
    ]
    out.table(["task", "metric", "value", "+-", "items", "shots"], rows, left=2)
    out.text(f"on {engine.backend} {engine.device} {engine.dtype}")
    out.result({"tasks": found, "engine": engine})


def _direction(result: "TaskResult", metric: str) -> str:
    better = result.higher_is_better.get(metric.partition(",")[0])
    return "" if better is None else f" ({'more' if better else 'less'} is better)"
