"""`lmopt export`: write a model in an engine's format, through the parity gate."""

import time
from typing import Annotated

import typer

from lmopt.cli.opening import open_model
from lmopt.cli.options import OutFolder, Overwrite, Source, Trust, WeightsDtype, assignments, next_step
from lmopt.cli.output import Output, size
from lmopt.cli.tables import parity_table


def export(
    out: Output,
    source: Source,
    folder: OutFolder,
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="Name of an exporter; `lmopt backends` lists them. Repeatable: one folder then holds several "
            "formats. Default: onnx.",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Dialect of the format; default: the exporter's first.")
    ] = None,
    dtype: WeightsDtype = "auto",
    opset: Annotated[int | None, typer.Option(help="Version of the ONNX operators.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other option of the exporter; repeatable."),
    ] = None,
    overwrite: Overwrite = False,
    trust: Trust = False,
) -> None:
    """Export a model and prove that the result computes the same.

    Where the result differs from the model by more than the tolerance, nothing is written and the exit
    status is 1.
    """
    from lmopt.evaluation import PeakMemory, folder_size_bytes
    from lmopt.exporter import Exporter, weight_bytes

    options = assignments(option, "--option")
    if opset is not None:
        options["opset"] = opset
    began = time.perf_counter()
    with PeakMemory() as memory:
        exporter = Exporter(*(format_ or []), target=target, **options)
        model = open_model(out, source, dtype=dtype, trust=trust)
        with out.progress() as tell:
            artifact = exporter.export(model, folder, overwrite=overwrite, progress=tell)
    seconds = time.perf_counter() - began
    parity = artifact.manifest["parity"]
    for name in artifact.formats:
        said = artifact.manifest["formats"][name]
        if "fallback" in said:
            out.text(f"{name}: written as {said['target']!r}, not as {target!r}, because {said['fallback']}.")
    for name in artifact.formats:
        if name in parity:
            parity_table(out, parity[name])
        else:
            out.text(f"{name}: every weight was read back and is equal to the original's, bit by bit.")
    disk = folder_size_bytes(artifact.path)
    out.text(
        f"{artifact.path}: {', '.join(artifact.formats)}, {size(disk)}; {seconds:.0f} s in all, "
        f"peak memory {size(memory.peak_bytes)} (the model's weights: {size(weight_bytes(model))})"
    )
    out.note(next_step(folder, model.facts))
    out.result(
        {
            "artifact": artifact.path,
            "formats": artifact.formats,
            "bytes": disk,
            "seconds": seconds,
            "peak_memory_bytes": memory.peak_bytes,
            "peak_memory_exact": memory.exact,
            "parity": parity,
            "targets": {
                name: {key: said[key] for key in ("target", "fallback") if key in said}
                for name, said in artifact.manifest["formats"].items()
            },
        }
    )
