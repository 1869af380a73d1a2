"""`lmopt translate`: what an encoder-decoder makes of each line."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lmopt.cli.opening import open_runtime
from lmopt.cli.options import Backend, Device, Dtype, Source, Threads, Trust, assignments
from lmopt.cli.output import Output

if TYPE_CHECKING:
    from lmopt.applications import Opinion

LanguageModel = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="A decoder that is asked about what is written: folder, file or hub id."
    ),
]
Weight = Annotated[float, typer.Option(min=0.0, help="How much its log-probabilities count.")]
Method = Annotated[
    Literal["rescore", "fuse"],
    typer.Option(
        help="It chooses among whole texts, or has a say in each token (the same tokenizer needed)."
    ),
]
WordBonus = Annotated[float, typer.Option(help="Added for each word of a text; for rescore.")]


def translate(
    out: Output,
    source: Source,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="Texts; lines of stdin where none is given.", show_default=False
        ),
    ] = None,
    backend: Backend = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of beam search; 1 is off.")] = 1,
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
    """Translate texts, or whatever else the model was trained to make of them; one line each to stdout."""
    given = texts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    options = assignments(set_) | ({"num_beams": num_beams} if num_beams > 1 else {})
    place = {"backend": backend, "device": device, "dtype": dtype, "threads": threads, "trust": trust}
    with (
        open_runtime(out, source, **place) as runtime,
        asked(out, language_model, lm_weight, lm_method, word_bonus, place) as opinion,
    ):
        began = time.perf_counter()
        found = runtime.translate(given, opinion=opinion, **options)
        seconds = time.perf_counter() - began
        engine = runtime.report().actual
    show(out, {"texts": found, "seconds": seconds, "engine": engine})


@contextmanager
def asked(
    out: Output,
    source: str | None,
    weight: float,
    method: Literal["rescore", "fuse"],
    word_bonus: float,
    place: dict[str, Any],
) -> "Iterator[Opinion | None]":
    """Open the language model that is to be asked, if there is one, on the same engine."""
    if source is None:
        yield None
        return
    from lmopt.applications import Opinion

    with open_runtime(out, source, **place) as runtime:
        yield Opinion(runtime, weight, method, word_bonus)


def show(out: Output, result: dict[str, Any]) -> None:
    """Write the texts, and say how long they took on what."""
    for text in result["texts"]:
        out.raw(f"{text}\n")
    engine = result["engine"]
    out.note(
        f"{len(result['texts'])} texts in {result['seconds']:.1f} s on {engine.backend} {engine.device} {engine.dtype}"
    )
    out.result(result)
