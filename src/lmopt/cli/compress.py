"""`lmopt compress`: make a model smaller by a recipe, and say what that cost."""

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmopt.cli.opening import open_model, open_runtime
from lmopt.cli.options import OutFolder, Overwrite, Source, Trust, WeightsDtype, assignments, next_step
from lmopt.cli.output import Output, size
from lmopt.cli.references import judged, pairs_to_judge

if TYPE_CHECKING:
    from lmopt.compression.calibration import Calibration
    from lmopt.compression.step import Step
    from lmopt.evaluation.loss import CompressionReport
    from lmopt.evaluation.tolerances import Tolerance
    from lmopt.interop.references import Pairs
    from lmopt.model import Model


def compress(
    out: Output,
    source: Source,
    folder: OutFolder,
    recipe: Annotated[
        str,
        typer.Option(
            help="JSON file of steps (or an artefact's lmopt.json), or the name of one step, with its fields by "
            "--set: --recipe gptq --set bits=4 --set group_size=64. `lmopt backends` lists the steps.",
            show_default=False,
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A field of a step given by name; repeatable."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text that the model reads while steps need it; for an encoder-decoder lines as for --pairs.",
            show_default=False,
        ),
    ] = None,
    self_calibrate: Annotated[
        bool, typer.Option("--self-calibrate", help="Let the model write the calibration text (slow).")
    ] = False,
    rows: Annotated[
        int, typer.Option(min=1, help="Stretches of calibration text; pairs are read whole.")
    ] = 128,
    row_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a stretch.")] = 512,
    seed: Annotated[int, typer.Option(help="Chooses the stretches.")] = 0,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text to measure the loss on; not the calibration's. Default: a few built-in sentences.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of --text to measure on.")] = 8192,
    pairs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help='Of an encoder-decoder: measure the loss on lines of {"source": TEXT, "text": "..."} or '
            '{"audio": PATH, "text": "..."}, and the errors of what both models write.',
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(help="Refuse a loss beyond this row of lmopt's table: int8, int4.", show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Refuse a larger mean KL divergence, in nats.", show_default=False)
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None, typer.Option(min=1.0, help="Refuse a larger ratio of perplexities.", show_default=False)
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            help="Measure prefill and decode before and after on this engine, such as onnxruntime.",
            show_default=False,
        ),
    ] = None,
    quantization_format: Annotated[
        str,
        typer.Option(
            "--quantization-format",
            "--format",
            help="How quantized weights are written: lmopt (all that lmopt knows), or compressed-tensors, which "
            "transformers and vLLM read too.",
        ),
    ] = "lmopt",
    dequantize: Annotated[
        bool,
        typer.Option("--dequantize", help="Write parts in float that compressed-tensors cannot hold."),
    ] = False,
    dtype: WeightsDtype = "auto",
    overwrite: Overwrite = False,
    trust: Trust = False,
) -> None:
    """Compress a model and measure the loss.

    Where the loss exceeds a limit that was given, nothing is written and the exit status is 1. Without a limit,
    one that is unusual for the width is a warning.
    """
    from lmopt.compressor import Compressor, LossWarning
    from lmopt.evaluation import PeakMemory

    if pairs is not None and text is not None:
        raise typer.BadParameter("give a text or pairs, not both", param_hint="--pairs")
    steps = _steps(recipe, assignments(set_, "--set"))
    compressor = Compressor(steps, tolerance=_limits(tolerance, max_kl, max_perplexity_ratio))
    given = None if pairs is None else pairs_to_judge(pairs)
    began = time.perf_counter()
    with PeakMemory() as memory:
        model = open_model(out, source, dtype=dtype, trust=trust)
        texts = None if text is None else [_head(model, text, tokens)]
        sources = None
        if given is not None:
            sources, texts = _read(model, given)
        with out.progress() as tell, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", LossWarning)
            small = compressor.compress(
                model,
                calibration=_calibration(model, calibration, self_calibrate, rows, row_tokens, seed),
                texts=texts,
                sources=sources,
                progress=tell,
            )
        artifact = small.save_pretrained(
            folder, overwrite=overwrite, quantization_format=quantization_format, dequantize=dequantize
        )
    seconds = time.perf_counter() - began
    for one in caught:
        out.warn(str(one.message))
    report = small.report
    assert report is not None
    show(out, report)
    out.text(
        f"{artifact.path}: {size(sum(one.stat().st_size for one in artifact.path.iterdir()))}; "
        f"{seconds:.0f} s in all, peak memory {size(memory.peak_bytes)}"
    )
    written = {} if given is None else _written(out, model, small, given)
    measured = {} if speed is None else _speeds(out, model, small, speed)
    out.note(next_step(folder, model.facts, "onnxruntime"))
    out.result(
        {
            "artifact": artifact.path,
            "recipe": [step.to_dict() for step in steps],
            "loss": report.to_dict(),
            "seconds": seconds,
            "peak_memory_bytes": memory.peak_bytes,
            "written": written,
            "speed": measured,
        }
    )


def show(out: Output, report: "CompressionReport") -> None:
    """Write a report as tables."""
    one = report.difference
    out.table(
        ["", "before", "after", "change"],
        [
            [
                "weights",
                size(report.float_bytes),
                size(report.bytes),
                f"{report.float_bytes / report.bytes:.2f}x smaller",
            ],
            [
                "perplexity",
                f"{report.float_perplexity:.3f}",
                f"{report.perplexity:.3f}",
                f"x {report.perplexity_ratio:.4f} +- {report.perplexity_ratio_stderr:.4f}",
            ],
        ],
        title=f"Loss on {report.tokens:,} tokens of {report.texts} texts",
    )
    out.table(
        ["KL mean", "median", "p99", "max", "top-1", "top-1 with ties"],
        [
            [
                *(f"{value:.4g}" for value in (one.kl_mean, one.kl_p50, one.kl_p99, one.kl_max)),
                f"{one.top1_raw:.2%}",
                f"{one.top1:.2%}",
            ]
        ],
        left=0,
    )
    if report.layer_errors:
        rows = [[path, f"{error:.2%}"] for path, error in report.worst_layers]
        out.table(["worst layers", "error of the output"], rows)


def _steps(recipe: str, fields: dict[str, Any]) -> "list[Step]":
    from lmopt.compression.recipe import load_recipe, step_from_dict

    if Path(recipe).is_file():
        if fields:
            raise typer.BadParameter("a recipe's file says its fields itself", param_hint="--set")
        return load_recipe(recipe)
    return [step_from_dict({"step": recipe, **fields})]


def _calibration(
    model: "Model", path: Path | None, self_calibrate: bool, rows: int, row_tokens: int, seed: int
) -> "Calibration | None":
    from lmopt.compression.calibration import Calibration

    if path is not None and self_calibrate:
        raise typer.BadParameter(
            "give a file or let the model write, not both", param_hint="--self-calibrate"
        )
    if path is None and not self_calibrate:
        return None
    if path is not None and model.facts.source is not None:
        if Calibration(None, rows=rows, row_tokens=row_tokens, seed=seed) != Calibration(None):
            raise typer.BadParameter(
                "an encoder-decoder reads all pairs of the file: leave --rows, --row-tokens and --seed out",
                param_hint="--calibration",
            )
        from lmopt.interop.references import read_pairs

        sources, right = _read(model, read_pairs(path))
        return Calibration(right, sources=sources)
    texts = None if path is None else (path.read_text(encoding="utf-8"),)
    return Calibration(texts, rows=rows, row_tokens=row_tokens, seed=seed)


def _limits(row: str | None, max_kl: float | None, max_perplexity_ratio: float | None) -> "Tolerance | None":
    from dataclasses import replace

    from lmopt.evaluation.tolerances import Tolerance, tolerance_for

    if row is None and max_kl is None and max_perplexity_ratio is None:
        return None
    limits = Tolerance("given", kl_mean=float("inf"), top1=0.0, perplexity_ratio=float("inf"))
    if row is not None:
        limits = tolerance_for(row)
    if max_kl is not None:
        limits = replace(limits, kl_mean=max_kl)
    if max_perplexity_ratio is not None:
        limits = replace(limits, perplexity_ratio=max_perplexity_ratio)
    return limits


def _head(model: "Model", path: Path, tokens: int) -> str:
    """Give so many tokens of a file's text."""
    words = path.read_text(encoding="utf-8")
    if model.tokenizer is None:
        return words
    # No token is shorter than a character by more than this: what is cut off here is not needed.
    return model.tokenizer.decode(
        model.tokenizer.encode(words[: 16 * tokens])[:tokens], skip_special_tokens=True
    )


def _read(model: "Model", pairs: "Pairs") -> tuple[list[Any], list[str]]:
    """Give sources as the model's encoder takes them, and what is right."""
    from lmopt.errors import UnsupportedError

    if model.facts.source is None:
        raise UnsupportedError(f"{model.source} has no encoder, so there are no pairs for it; give --text")
    return list(pairs.read(model.facts.source)), list(pairs.texts)


def _written(out: Output, model: "Model", small: "Model", pairs: "Pairs") -> dict[str, Any]:
    """Judge what the original and the compressed model write."""
    with (
        open_runtime(out, model, backend="torch") as before,
        open_runtime(out, small, backend="torch") as after,
    ):
        return judged(out, {"before": before, "after": after}, pairs)


def _speeds(out: Output, model: "Model", small: "Model", engine: str) -> dict[str, Any]:
    """Measure the original and the compressed model on an engine, round by round."""
    from lmopt.evaluation import compare_speed

    half = min(128, (model.facts.context_length or 256) // 2)
    with (
        open_runtime(out, model, backend=engine) as before,
        open_runtime(out, small, backend=engine) as after,
        out.progress() as tell,
    ):
        found = compare_speed(
            {"before": before.engine, "after": after.engine},
            prompt_tokens=half,
            new_tokens=half,
            progress=lambda done, total: tell("measure speed", done, total),
        )
    rows = [
        [name, str(one.prefill_tokens_per_s), str(one.decode_tokens_per_s)] for name, one in found.items()
    ]
    title = f"Speed on {engine}, prompt {half}, {half} new tokens"
    out.table(["", "prefill tokens/s", "decode tokens/s"], rows, title=title)
    ratio = found["after"].decode_tokens_per_s.median / found["before"].decode_tokens_per_s.median
    if ratio < 1:
        out.warn(f"the compressed model is SLOWER on {engine}: {ratio:.2f}x the original's decoding speed")
    return {**found, "decode_ratio": ratio}
