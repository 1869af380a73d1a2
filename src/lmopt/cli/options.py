"""Options that several verbs share, each described once."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lmopt.types import ModelFacts

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A Hugging Face folder or hub id, a .gguf file, or an lmopt artefact.",
        show_default=False,
    ),
]
OutFolder = Annotated[
    Path,
    typer.Argument(
        metavar="OUT", help="Folder to create; it appears complete or not at all.", show_default=False
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an artefact that is at OUT.")]
WeightsDtype = Annotated[str, typer.Option(help="Type of the weights, or auto: the model's own.")]
Backend = Annotated[
    str | None,
    typer.Option(help="Engine; default: torch, and for an artefact the engine that verified it."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... What is not there is an error.")]
Dtype = Annotated[str, typer.Option(help="Compute type, or auto: the model's own.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads inside one operator; default: the CPU quota.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Let code and pickles that come with the model run.")]


def assignments(words: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """Read `name=value` words; a value is read as JSON where it is JSON, else as text.

    >>> assignments(["top_k=5", "early_stopping=never", "eos_token_id=[1, 2]"])
    {'top_k': 5, 'early_stopping': 'never', 'eos_token_id': [1, 2]}

    Raises:
        typer.BadParameter: A word has no `=`.
    """
    found: dict[str, Any] = {}
    for word in words or []:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{word!r} is not of the form name=value", param_hint=option)
        try:
            found[name] = json.loads(value)
        except ValueError:
            # Python's own words are what people write who know the fields from Python.
            found[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def next_step(folder: Path, facts: ModelFacts, backend: str = "") -> str:
    """Say how a model that was just written is tried."""
    engine = f" --backend {backend}" if backend else ""
    if facts.source is None:
        return f'Next: lmopt run {folder}{engine} "The capital of France is"'
    if facts.source.kind == "features":
        return f"Next: lmopt transcribe {folder} clip.wav{engine}"
    return f'Next: lmopt translate {folder} "How are you today?"{engine}'
