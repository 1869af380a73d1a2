"""Open what a user names on the command line, and find the engines that can run it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmopt.cli.output import Output
from lmopt.registry import backends, exporters

if TYPE_CHECKING:
    from lmopt.artifact import Artifact
    from lmopt.model import Model
    from lmopt.runtime import Runtime


def open_runtime(out: Output, source: "str | Model | Artifact", **options: Any) -> "Runtime":
    """Open `lmopt.Runtime` with progress shown; options as there."""
    from lmopt.runtime import Runtime

    with out.progress() as tell:
        return Runtime(source, progress=tell, **options)


def open_model(out: Output, source: str, **options: Any) -> "Model":
    """Load `lmopt.Model` with progress shown; options as for `Model.from_pretrained`."""
    from lmopt.model import Model

    with out.progress() as tell:
        tell(f"load {Path(source).name}", 0, 1)
        return Model.from_pretrained(source, **options)


def room(runtime: "Runtime", prompt_tokens: int, wanted: int) -> int:
    """Say how many of the wanted new tokens the context has room for, at least 1."""
    limit = runtime.facts.context_length
    return wanted if limit is None else max(1, min(wanted, limit - prompt_tokens))


def formats_of(source: str) -> tuple[str, ...]:
    """List the formats in which a source can be had: an artefact's own, a model's by export."""
    from lmopt.artifact import Artifact, is_artifact

    if not is_artifact(source):
        written = (one.spec.format for one in exporters.status() if one.spec and not one.problem)
        return ("module", *written)
    artifact = Artifact.open(source, verify=False)
    stated = artifact.manifest["formats"].get("safetensors")
    loadable = stated is not None and stated.get("library") != "custom"
    return (*artifact.formats, "module") if loadable else artifact.formats


def engines_for(formats: Sequence[str], device: str = "cpu") -> dict[str, str]:
    """Examine every backend.

    Args:
        formats: Formats in which the model can be had.
        device: Where it is to run.

    Returns:
        Name to the reason why it cannot run the model, `""` where it can; torch, the reference, first.
    """
    found = {}
    for one in sorted(backends.status(), key=lambda one: (one.name != "torch", one.name)):
        if one.spec is None or one.problem:
            found[one.name] = one.problem
            continue
        support = one.spec.supports(formats=tuple(formats), device=device, dtype="auto")
        found[one.name] = "; ".join(support.reasons)
    return found
