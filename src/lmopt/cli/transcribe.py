"""`lmopt transcribe`: what is said in sound files."""

import time
from dataclasses import asdict
from typing import Annotated

import typer

from lmopt.cli.opening import open_runtime
from lmopt.cli.options import Backend, Device, Dtype, Source, Threads, Trust, assignments
from lmopt.cli.output import Output
from lmopt.cli.translate import LanguageModel, Method, Weight, WordBonus, asked, show


def transcribe(
    out: Output,
    source: Source,
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Sound files, 16,000 samples a second.", show_default=False),
    ],
    backend: Backend = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    language: Annotated[
        str | None, typer.Option(help="Code of the language that is spoken; heard from the sound by default.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="transcribe, or translate into English; the former by default.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of beam search; 1 is off.")] = 1,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Say when each stretch of text is said, a line each.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field of GenerationConfig; repeatable."),
    ] = None,
    language_model: LanguageModel = None,
    lm_weight: Weight = 0.3,
    lm_method: Method = "rescore",
    word_bonus: WordBonus = 0.0,
    trust: Trust = False,
) -> None:
    """Write down what is said in sound files; one line each to stdout."""
    options = assignments(set_) | ({"num_beams": num_beams} if num_beams > 1 else {})
    if timestamps:
        options["return_timestamps"] = True
    place = {"backend": backend, "device": device, "dtype": dtype, "threads": threads, "trust": trust}
    with (
        open_runtime(out, source, **place) as runtime,
        asked(out, language_model, lm_weight, lm_method, word_bonus, place) as opinion,
    ):
        began = time.perf_counter()
        found = runtime.transcribe(files, language=language, task=task, opinion=opinion, **options)
        seconds = time.perf_counter() - began
        engine = runtime.report().actual
    result = {"files": files, "texts": found, "seconds": seconds, "engine": engine}
    if any(isinstance(one, list) for one in found):
        result["texts"] = [
            "\n".join(f"[{one.start_s:.2f} -> {one.end_s:.2f}] {one.text}" for one in sound)
            for sound in found
        ]
        result["segments"] = [[asdict(one) for one in sound] for sound in found]
    show(out, result)
