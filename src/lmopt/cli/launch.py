"""`lmopt launch`: several processes that train one model."""

from typing import Annotated

import typer

from lmopt.cli.output import Output


def launch(
    out: Output,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="-- COMMAND...",
            help="A verb of lmopt with its options, such as: train MODEL --data text.txt --output out; or a Python "
            "script and its arguments.",
            show_default=False,
        ),
    ],
    nproc: Annotated[int, typer.Option(min=1, help="Processes, on this machine.")] = 2,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often all begin again, from the last checkpoint, if one dies.")
    ] = 0,
) -> None:
    """Run a command in several processes that train together: a thin torchrun, on the loopback interface only.

    If a process dies, the others are ended and its rank is named. For several machines use torchrun.
    """
    from lmopt.training.launching import launch as start

    out.note(f"{nproc} processes: {' '.join(words)}")
    start(words, nproc=nproc, max_restarts=max_restarts)
    if not out.as_json:
        out.note("all processes ended well")
