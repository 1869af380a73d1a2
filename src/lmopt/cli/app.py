"""The verbs, put together."""

from collections.abc import Callable
from typing import Annotated, Final

import typer

from lmopt import __version__
from lmopt.cli import (
    backends,
    batch,
    bench,
    build,
    chat,
    compare,
    compress,
    demo,
    doctor,
    evaluate,
    export,
    launch,
    recommend,
    run,
    serve,
    train,
    transcribe,
    translate,
    tune,
)
from lmopt.cli.verb import command

app = typer.Typer(
    help="Take a trained language model to its fastest trustworthy deployment: same tokens on every engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmopt {__version__}")
        raise typer.Exit


@app.callback()
def _lmopt(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and stop.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Stand above the verbs."""


_VERBS: Final[dict[str, Callable[..., None]]] = {
    "demo": demo.demo,
    "run": run.run,
    "chat": chat.chat,
    "translate": translate.translate,
    "transcribe": transcribe.transcribe,
    "export": export.export,
    "build": build.build,
    "compress": compress.compress,
    "train": train.train,
    "recommend": recommend.recommend,
    "tune": tune.tune,
    "launch": launch.launch,
    "compare": compare.compare,
    "bench": bench.bench,
    "eval": evaluate.evaluate,
    "batch": batch.batch,
    "serve": serve.serve,
    "backends": backends.list_backends,
    "doctor": doctor.doctor,
}
for _name, _verb in _VERBS.items():
    app.command(_name)(command(_verb))
