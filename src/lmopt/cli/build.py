"""`lmopt build`: compile an exported folder for its engine ahead of time, or check that it could be."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lmopt.cli.options import assignments
from lmopt.cli.output import Output, size
from lmopt.errors import UnsupportedOptionError
from lmopt.registry import backends

_BUILDERS = {"tensorrt": "lmopt.backends.tensorrt.ahead:build_folder"}


def build(
    out: Output,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="An artefact with the format onnx, dialect portable.", show_default=False
        ),
    ],
    backend: Annotated[str, typer.Option(help="Engine that compiles.")] = "tensorrt",
    flavour: Annotated[str, typer.Option(help="auto, tensorrt or tensorrt_rtx.")] = "auto",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X.Y",
            help="GPU to compile for, such as 8.9; repeatable, one engine each. TensorRT for RTX only, which needs "
            "no GPU for it. Default: all that it builds for by default.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Read the graph and hold its types against the targets; compile nothing."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Copy the engine to this file as well, its record beside it.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other build option, such as max_batch=8; repeatable."),
    ] = None,
) -> None:
    """Compile an exported model for a GPU, into lmopt's cache.

    A runtime on such a GPU then finds the engine instead of compiling. That a graph compiles does not say that
    it runs: nothing is executed here.
    """
    if backend not in _BUILDERS:
        raise UnsupportedOptionError(
            f"backend {backend!r} compiles nothing ahead of time; {', '.join(_BUILDERS)} does. "
            f"Run the folder as it is: lmopt run {folder} --backend {backend}"
        )
    work = backends.load(backend, target=_BUILDERS[backend])
    options: dict[str, Any] = {"flavour": flavour, **assignments(option, "--option")}
    with out.progress() as tell:
        rows = work(folder, options, targets=compute_capability or (), check=check, output=output, tell=tell)
    header = ("graph", "compute capability", "compiler", "types", "size", "seconds", "from")
    out.table(header, [_cells(row) for row in rows], left=4)
    for row in rows:
        for warning in row.get("warnings", ()):
            out.note(warning)
    if len({row["graph"] for row in rows}) > 1:
        out.note("lmopt compiles encoder-decoders for TensorRT; it does not run them there yet.")
    if check:
        out.text("The graph can be read, and every target has its types. Nothing was compiled.")
    out.result({"engines": rows, "checked_only": check})


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    types = ", ".join(f"{name} {count}" for name, count in row["types"].items())
    compiled = (
        (size(row["bytes"]), f"{row['seconds']:.1f}", "cache" if row["from_cache"] else "built")
        if "bytes" in row
        else ("-", "-", "-")
    )
    return (
        row["graph"],
        ", ".join(row["targets"]) or "default",
        f"{row['flavour']} {row['version']}",
        types,
        *compiled,
    )
