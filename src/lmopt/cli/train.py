"""`lmopt train`: go on training a model on text files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmopt.cli.opening import open_model
from lmopt.cli.options import Source, Trust, assignments
from lmopt.cli.output import Output

if TYPE_CHECKING:
    from lmopt.training.progress import Progress
    from lmopt.training.result import TrainingProgress

_TextFile = typer.Option(
    exists=True,
    dir_okay=False,
    help="Text file, or .jsonl with a field 'text'; repeatable.",
    show_default=False,
)


def train(
    out: Output,
    source: Source,
    data: Annotated[list[Path], _TextFile],
    output: Annotated[
        Path,
        typer.Option(help="Folder for model/, checkpoints/, training.json and loss.png.", show_default=False),
    ],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            exists=True,
            dir_okay=False,
            help="Held-out text, for perplexity; repeatable.",
            show_default=False,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps; default: --epochs decides.", show_default=False),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    learning_rate: Annotated[float, typer.Option(help="Peak step size of AdamW.")] = 5e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that each process reads in one forward.")] = 8,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; default: 512, or the model's context.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other field of lmopt.training.TrainingConfig, such as warmup_steps=100 or bf16=true; repeatable.",
        ),
    ] = None,
    no_resume: Annotated[
        bool,
        typer.Option("--no-resume", help="Remove checkpoints that are in the output folder, and begin anew."),
    ] = False,
    trust: Trust = False,
) -> None:
    """Train a model on text, by maximum likelihood of the next token.

    A run that was interrupted goes on from its last checkpoint when the same command is given again. Several
    processes train one model together under `lmopt launch`.
    """
    from lmopt.training import TrainingConfig
    from lmopt.training import train as run
    from lmopt.training.parallel import leave

    config = TrainingConfig.from_options(
        **{
            "max_steps": max_steps,
            "num_train_epochs": epochs,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size,
            "block_size": block_size,
            **assignments(set_, "--set"),
        }
    )
    speaks = os.environ.get("RANK", "0") == "0"
    model = open_model(out, source, dtype="float32", trust=trust)
    result = run(
        model,
        data,
        evaluation=evaluation or None,
        output=output,
        config=config,
        resume="never" if no_resume else True,
        progress=_progress(out),
    )
    leave()
    if not speaks:
        return
    told: dict[str, Any] = result.to_dict()
    if result.resumed_from:
        out.note(f"went on from the checkpoint of step {result.resumed_from}")
    at_end = "" if result.perplexity is None else f"; held-out perplexity {result.perplexity:.3f}"
    out.text(
        f"{result.steps} steps, {result.tokens:,} tokens ({result.corpus['documents']:,} documents of "
        f"{result.corpus['tokens']:,} tokens), {result.tokens_per_s:,.0f} tokens/s on {result.processes} process(es); "
        f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}{at_end}"
    )
    if result.loss_plot is not None:
        out.text(f"loss by step: {result.loss_plot}")
    out.note(f'Next: lmopt run {output / "model"} "Once upon a time"')
    out.result({"model": output / "model", **told, "loss_plot": result.loss_plot, "config": config})


def _progress(out: Output) -> "Progress":
    """Show a bar where somebody watches; else say some ten times where the run stands."""
    if out.live:
        return True
    from lmopt.training.progress import describe

    told = -1

    def note(now: "TrainingProgress") -> None:
        nonlocal told
        tenth = now.step * 10 // now.total
        if tenth != told:
            told = tenth
            out.note(f"step {now.step} of {now.total}: {describe(now)}")

    return note
