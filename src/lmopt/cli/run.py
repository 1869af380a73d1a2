"""`lmopt run`: generate from one prompt."""

import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lmopt.cli.opening import open_runtime, room
from lmopt.cli.options import Backend, Device, Dtype, Source, Threads, Trust, assignments
from lmopt.cli.output import Output

if TYPE_CHECKING:
    from lmopt.generation import Generation
    from lmopt.runtime import Runtime

NEW_TOKENS: Final = 128


def run(
    out: Output,
    source: Source,
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.", show_default=False),
    ],
    backend: Backend = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Most new tokens; default: {NEW_TOKENS}, or what the context has room for."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Divides the logits; turns sampling on.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this probability.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from so many likeliest tokens; 0 keeps all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the generation; repeatable.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field of GenerationConfig; repeatable."),
    ] = None,
    stream: Annotated[bool, typer.Option(help="Show the text while it grows.")] = True,
    trust: Trust = False,
) -> None:
    """Generate from a prompt.

    Only the new text goes to stdout. Without sampling options the model's own defaults hold.
    """
    options = assignments(set_)
    named = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop_strings": stop}
    options |= {name: value for name, value in named.items() if value not in (None, [])}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    text = sys.stdin.read() if prompt == "-" else prompt

    with open_runtime(
        out, source, backend=backend, device=device, dtype=dtype, threads=threads, trust=trust
    ) as runtime:
        ids = runtime.tokenizer.encode(text) if runtime.tokenizer is not None else text
        if not {"max_new_tokens", "max_length"} & set(options):
            options["max_new_tokens"] = room(runtime, len(ids), NEW_TOKENS)
        began = time.perf_counter()
        one_row = options.get("num_beams", 1) == 1 and options.get("num_return_sequences", 1) == 1
        if stream and one_row and not out.as_json:
            found = [show(out, runtime.stream(ids, **options))]
        else:
            found = _generate(out, runtime, ids, options)
        seconds = time.perf_counter() - began
        engine = runtime.report().actual
    tokens = sum(len(one.token_ids) for one in found)
    out.note(f"{tokens} tokens in {seconds:.1f} s on {engine.backend} {engine.device} {engine.dtype}")
    out.result({"generations": found, "seconds": seconds, "engine": engine})


def show(out: Output, pieces: "Generator[str, None, Generation]") -> "Generation":
    """Write a stream's text while it grows, and return what it makes in the end."""
    while True:
        try:
            out.raw(next(pieces))
        except StopIteration as end:
            out.raw("\n")
            generation: Generation = end.value
            return generation


def _generate(out: Output, runtime: "Runtime", ids: Any, options: dict[str, Any]) -> "list[Generation]":
    """Generate to the end, then write each sequence."""
    with out.progress() as tell:
        count = iter(range(1, sys.maxsize))
        most = options.get("max_new_tokens", 0) * options.get("num_return_sequences", 1)
        found = runtime.generate(ids, on_token=lambda token: tell("generate", next(count), most), **options)
    generations = found if isinstance(found, list) else [found]
    for one in generations:
        out.raw(f"{one}\n")
    return generations
