"""The pieces of work of a search, each done in a process of its own: plain data in, plain data out."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmopt.artifact import Artifact, is_artifact, require_space
from lmopt.compression.calibration import Calibration
from lmopt.compression.recipe import step_from_dict
from lmopt.compressor import Compressor, LossWarning, write_rows
from lmopt.contracts import Engine
from lmopt.evaluation import Speed, folder_size_bytes, measure_speed, peak_memory_bytes
from lmopt.evaluation.loss import Pieces, measure_loss
from lmopt.exporter import Exporter
from lmopt.model import Model
from lmopt.registry import backends
from lmopt.runtime import Runtime
from lmopt.tuning.work import Progress
from lmopt.types import FloatArray, IntArray

WINDOW: Final = 512
"""Tokens of a window that quality is measured on."""
CALIBRATION_ROWS: Final = 32
"""Stretches of 512 tokens that calibrated steps read."""
ROWS: Final = "rows.npy"
LOGITS: Final = "logits.npy"
CALIBRATION: Final = "calibration.txt"

_LOGITS_BYTES: Final = 1 << 29
_PROBE_TOKENS: Final = 4


def prepare(
    source: str,
    backend: str | None,
    dtype: str,
    trust: bool,
    text: str | None,
    score_tokens: int,
    folder: str,
    tell: Progress,
) -> dict[str, Any]:
    """Compute the logits of the float model, which all others are held against.

    Args:
        source: The model.
        backend: Engine that computes them where the weights cannot be loaded; `None` for eager torch.
        dtype: Type that weights are loaded in.
        trust: As for `lmopt.Runtime`.
        text: Text that is scored; `None` for a model without a tokenizer, which reads random ids.
        score_tokens: Tokens of it.
        folder: Receives `ROWS` and `LOGITS`.
        tell: Told of windows done.
    """
    tell("load the model", 0, 1)
    if backend is None:
        model = Model.from_pretrained(source, dtype=dtype, trust=trust)
        reference = backends.load("torch", target="lmopt.backends.torch.reference:FullForward")
        pieces: Pieces = reference(model.module, lean=True).pieces
        facts, tokenizer, runtime = model.facts, model.tokenizer, None
    else:
        runtime = Runtime(source, backend=backend, trust=trust)
        pieces, facts, tokenizer = _engine_pieces(runtime.engine), runtime.facts, runtime.tokenizer
    # What all logits take on disk, and again in the page cache, stays in bounds for large vocabularies.
    count = max(64, min(score_tokens, _LOGITS_BYTES // (4 * facts.vocab_size)))
    ids = _ids(tokenizer, text, count, facts.vocab_size)
    width = min(WINDOW, facts.context_length or WINDOW)
    windows = _windows(ids, width)
    place = Path(folder)
    require_space(place, 4 * len(ids) * facts.vocab_size)
    shape = (sum(map(len, windows)), facts.vocab_size)
    logits = np.lib.format.open_memmap(place / LOGITS, "w+", np.float32, shape)
    at = 0
    for number, row in enumerate(windows):
        tell("reference logits", number, len(windows))
        for piece in pieces(row, 64):
            logits[at : at + len(piece)] = piece
            at += len(piece)
    logits.flush()
    np.save(place / ROWS, ids)
    if runtime is not None:
        runtime.close()
    return {"facts": asdict(facts), "tokens": len(ids), "text": tokenizer is not None and text is not None}


def write_calibration(source: str, dtype: str, trust: bool, folder: str, tell: Progress) -> dict[str, Any]:
    """Let the model write the text that calibrated steps read; see `lmopt.compressor.write_rows`."""
    model = Model.from_pretrained(source, dtype=dtype, trust=trust)
    assert model.tokenizer is not None
    rows = write_rows(model, Calibration(None, rows=CALIBRATION_ROWS), tell)
    written = "\n".join(model.tokenizer.decode(row.tolist()) for row in rows)
    (Path(folder) / CALIBRATION).write_text(written, encoding="utf-8")
    return {}


def compress(
    source: str,
    dtype: str,
    trust: bool,
    steps: Sequence[Mapping[str, Any]],
    stored: bool,
    calibration: str | None,
    folder: str,
    quick_tokens: int,
    keep: Mapping[str, float],
    target: str,
    tell: Progress,
) -> dict[str, Any]:
    """Apply a recipe, look at what it costs on a few tokens, and save what is worth it.

    Args:
        source: The model.
        dtype: Type that weights are loaded in.
        trust: As for `lmopt.Runtime`.
        steps: The recipe.
        stored: Whether the codes of a GGUF file are kept.
        calibration: File of text for steps that need it.
        folder: Has `ROWS` and `LOGITS`.
        quick_tokens: Tokens to look at.
        keep: Limits on `perplexity_ratio` and `kl_mean`; what is surely beyond one is not saved.
        target: Folder to create.
        tell: Told of progress.

    Returns:
        `loss` on the few tokens, and `broken`: the limits that it passes, in words.
    """
    tell("load the model", 0, 1)
    small = model = Model.from_pretrained(source, dtype=dtype, trust=trust, keep_quantization=stored)
    if steps:
        texts = None if calibration is None else (Path(calibration).read_text(encoding="utf-8"),)
        with warnings.catch_warnings():
            # What is lost is measured below, on the user's text.
            warnings.simplefilter("ignore", LossWarning)
            small = Compressor([step_from_dict(step) for step in steps]).compress(
                model,
                calibration=None if texts is None else Calibration(texts, rows=CALIBRATION_ROWS),
                progress=tell,
            )
    forward = backends.load("torch", target="lmopt.backends.torch.reference:FullForward")
    loss = _loss(
        forward(small.module, lean=True).pieces, Path(folder), model.facts.context_length, quick_tokens
    )
    broken = surely_broken(loss, keep)
    if not broken:
        small.save_pretrained(target, overwrite=True)
    return {"loss": loss, "broken": broken}


def surely_broken(loss: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """Name limits that a loss on a few tokens passes by more than the choice of these tokens explains.

    Args:
        loss: From `compress`.
        limits: On `perplexity_ratio` and `kl_mean`.
    """
    found = []
    if (limit := limits.get("perplexity_ratio")) is not None:
        ratio, error = loss["perplexity_ratio"], loss["perplexity_ratio_stderr"]
        if not ratio - 2 * error <= limit:
            found.append(
                f"perplexity ratio {ratio:.3f} +- {error:.3f} > {limit:g} on {loss['tokens']} tokens"
            )
    if (limit := limits.get("kl_mean")) is not None:
        # The mean over some hundred positions scatters by a fifth or so.
        kl = loss["kl_mean"]
        if not kl <= 1.5 * limit:
            found.append(f"mean KL {kl:.3g} > {limit:g} nats on {loss['tokens']} tokens")
    return found


def export(
    source: str,
    dtype: str,
    trust: bool,
    exporter: str,
    exporter_target: str,
    options: Mapping[str, Any],
    target: str,
    tell: Progress,
) -> dict[str, Any]:
    """Write a model for an engine, through the parity gate; see `lmopt.Exporter.export`."""
    tell("load the model", 0, 1)
    # A compressed folder says itself how its weights are stored.
    kept = is_artifact(source) and bool(Artifact.open(source, verify=False).manifest["recipe"])
    model = Model.from_pretrained(source, dtype="auto" if kept else dtype, trust=trust)
    artifact = Exporter(exporter, target=exporter_target, **options).export(
        model, target, overwrite=True, progress=tell
    )
    written = next(iter(artifact.manifest["formats"].values()))
    return {"target": written.get("target"), "fallback": written.get("fallback")}


def save_float(source: str, dtype: str, trust: bool, target: str, tell: Progress) -> dict[str, Any]:
    """Save a model as it is, as an artefact: what is handed on where the float model is best as it is."""
    tell("load the model", 0, 1)
    Model.from_pretrained(source, dtype=dtype, trust=trust).save_pretrained(target, overwrite=True)
    return {}


def measure(
    place: str,
    backend: str,
    device: str,
    dtype: str,
    threads: int | None,
    trust: bool,
    workload: Mapping[str, Any],
    folder: str | None,
    give_up_ms: float | None,
    tell: Progress,
) -> dict[str, Any]:
    """Measure a deployment: speed and memory first, then quality, whose logits would blur the memory.

    Args:
        place: Folder or file to open.
        backend: Engine.
        device: As for `lmopt.Runtime`.
        dtype: As for `lmopt.Runtime`.
        threads: As for `lmopt.Runtime`.
        trust: As for `lmopt.Runtime`.
        workload: Fields of `Workload`.
        folder: Has `ROWS` and `LOGITS`; `None` measures no quality.
        give_up_ms: A deployment whose tokens take longer on a short probe is not measured any further.
        tell: Told of progress.

    Returns:
        `speed`, `peak_memory_bytes`, `load_s`, `loss` (`None` where not measured), `gave_up`, `notes`, `engine`.
    """
    tell("open the engine", 0, 1)
    began = time.perf_counter()
    with Runtime(place, backend=backend, device=device, dtype=dtype, threads=threads, trust=trust) as runtime:
        load_s = time.perf_counter() - began
        engine, limit = runtime.engine, runtime.facts.context_length or 10**9
        prompt = min(workload["prompt_tokens"], max(1, limit // 2))
        new = min(workload["new_tokens"], max(2, limit // 2))
        short = min(16, prompt)
        probe = measure_speed(engine, prompt_tokens=short, new_tokens=_PROBE_TOKENS, rounds=1, warm_up=0)
        token_ms = probe.token_p50_ms.median
        notes: list[str] = []
        gave_up = give_up_ms is not None and token_ms > give_up_ms
        speed = probe
        if not gave_up:
            speed, notes = _measured(engine, probe, prompt, new, workload, tell)
        # A prompt of the workload's length is part of what the memory is for; the probe alone shows less.
        peak = peak_memory_bytes()
        report = runtime.report().actual
        loss = None
        if folder is not None and not gave_up:
            loss = _loss(_engine_pieces(engine), Path(folder), runtime.facts.context_length, None, tell)
    return {
        "speed": speed.to_dict(),
        "peak_memory_bytes": peak,
        "load_s": load_s,
        "loss": loss,
        "gave_up": gave_up,
        "notes": notes,
        "engine": {"dtype": report.dtype, "device": report.device, "versions": dict(report.versions)},
    }


def artifact_bytes(place: str) -> int:
    """Size of what a deployment is made of: the model's files, without those that are no part of it."""
    return folder_size_bytes(Path(place))


def _measured(
    engine: Engine, probe: Speed, prompt: int, new: int, workload: Mapping[str, Any], tell: Progress
) -> tuple[Speed, list[str]]:
    """Measure speed, with fewer and shorter rounds where it would take too long."""
    rounds, patience = workload["rounds"], workload["patience_s"]
    token_s = probe.token_p50_ms.median / 1e3
    read_s = prompt / probe.prefill_tokens_per_s.median
    notes: list[str] = []
    if (rounds + 1) * (read_s + new * token_s) > patience:
        fewer = max(1, min(rounds, int(patience / max(read_s + new * token_s, 1e-9)) - 1))
        shorter = max(2, min(new, int((patience / (fewer + 1) - read_s) / max(token_s, 1e-9))))
        notes.append(f"slow, so measured in {fewer} rounds of {shorter} tokens")
        rounds, new = fewer, shorter
    speed = measure_speed(
        engine,
        prompt_tokens=prompt,
        new_tokens=new,
        rounds=rounds,
        progress=lambda done, total: tell("measure speed", done, total),
    )
    return speed, notes


def _loss(
    candidate: Pieces, folder: Path, context: int | None, tokens: int | None, tell: Progress | None = None
) -> dict[str, Any]:
    """Hold logits against the float model's, on all rows or on the first tokens of them."""
    ids: IntArray = np.load(folder / ROWS)
    logits = np.load(folder / LOGITS, mmap_mode="r")
    at = 0

    def reference(row: IntArray, size: int) -> Iterator[FloatArray]:
        nonlocal at
        for start in range(0, len(row), size):
            stop = min(start + size, len(row))
            yield np.asarray(logits[at + start : at + stop])
        at += len(row)

    rows = _windows(ids[:tokens], min(WINDOW, context or WINDOW))
    report = measure_loss(reference, candidate, rows, bytes=1, float_bytes=1, texts="given", progress=tell)
    one = report.difference
    return {
        "perplexity": report.perplexity,
        "float_perplexity": report.float_perplexity,
        "perplexity_ratio": report.perplexity_ratio,
        "perplexity_ratio_stderr": report.perplexity_ratio_stderr,
        "kl_mean": one.kl_mean,
        "kl_p99": one.kl_p99,
        "top1": one.top1_raw,
        "nonfinite": one.nonfinite,
        "tokens": report.tokens,
    }


def _engine_pieces(engine: Engine) -> Pieces:
    """Let an engine read rows as `measure_loss` wants it."""

    def read(row: IntArray, size: int) -> Iterator[FloatArray]:
        state = engine.begin(1, capacity=len(row))
        logits, _ = engine.forward(row[None], np.array([len(row)], np.int64), state)
        for start in range(0, len(row), size):
            yield logits[0, start : start + size]

    return read


def _ids(tokenizer: Any, text: str | None, count: int, vocab_size: int) -> IntArray:
    if tokenizer is None or text is None:
        return np.random.default_rng(0).integers(0, vocab_size, count)
    # No token is longer than this by much: what is cut off is not needed.
    words = Path(text).read_text(encoding="utf-8")[: 16 * count]
    return np.array(tokenizer.encode(words, add_special_tokens=False)[:count], np.int64)


def _windows(ids: IntArray, width: int) -> list[IntArray]:
    """Cut ids into windows; a last one of a single token predicts nothing and is left out."""
    rows = [ids[start : start + width] for start in range(0, len(ids), width)]
    return [row for row in rows if len(row) > 1]
