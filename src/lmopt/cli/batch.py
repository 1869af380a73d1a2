"""`lmopt batch`: run a model over a file of rows, on many processes, each row exactly once."""

from pathlib import Path
from typing import Annotated

import typer

from lmopt.cli.options import Backend, Device, Dtype, Source, Threads, Trust, assignments
from lmopt.cli.output import Output


def batch(
    out: Output,
    source: Source,
    inputs: Annotated[
        Path,
        typer.Argument(
            metavar="INPUTS",
            help="A .jsonl file with prompt, text or messages in each row, or a text file with a prompt a line.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder for the results; a job that is in it goes on.", show_default=False
        ),
    ],
    task: Annotated[
        str, typer.Option(help="generate, or score: log-probabilities of each text.")
    ] = "generate",
    engine: Annotated[
        str, typer.Option(help="local: processes of this machine; ray: Ray Data actors.")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a model of its own.")] = 1,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows that are committed together.")] = 256,
    max_errors: Annotated[int, typer.Option(min=0, help="Rows that may fail; one more stops the job.")] = 100,
    field: Annotated[str | None, typer.Option(help="Field to read instead.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="From which each row's own seed is made.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most new tokens of a row.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field of GenerationConfig; repeatable."),
    ] = None,
    runtime_set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other option of the runtime or engine; repeatable."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default: Ray on this machine.", show_default=False)
    ] = None,
    backend: Backend = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    trust: Trust = False,
) -> None:
    """Run a model over a corpus.

    Stopped at any moment, the same command goes on where it was. Rows that fail are in OUT/errors.jsonl.
    """
    from lmopt.scaling import batch as run

    options = assignments(set_)
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    with out.progress(unit="rows") as tell:
        found = run(
            source,
            inputs,
            folder,
            task=task,  # type: ignore[arg-type]
            engine=engine,  # type: ignore[arg-type]
            workers=workers,
            rows_per_shard=rows_per_shard,
            max_errors=max_errors,
            field=field,
            seed=seed,
            backend=backend,
            device=device,
            dtype=dtype,
            threads=threads,
            trust=trust,
            runtime=assignments(runtime_set, "--runtime-set"),
            address=address,
            progress=tell,
            **options,
        )
    new = found.rows_in - found.resumed_rows
    out.text(
        f"{found.folder}: {found.rows_out:,} rows in {len(found.shards)} files, {found.errors:,} failed; "
        f"{new:,} rows in {found.seconds:.1f} s ({new / found.seconds:.1f} rows/s), {found.resumed_rows:,} were done"
    )
    if found.errors:
        out.warn(f"{found.errors} rows failed: see {found.folder / 'errors.jsonl'}")
    out.result({"batch": found})
