"""How much of what removing a fifth of a model's blocks costs does distillation win back, on what budget?

    python benchmarks/distillation.py MODEL --text FILE [--text FILE ...] --held-out FILE --folder WORK
        [--drop 6] [--teacher-rows 192] [--steps 100] [--piece-seconds S] [--write]

Four stages, each kept in WORK and never done twice: remove blocks (chosen on the first text); let the teacher write
texts; recover on the teacher's texts (read twice) and the given ones (of the held-out file itself the second half);
measure all three models on held-out text. With `--piece-seconds` the recovery stops behind the first checkpoint after
that time, and the next call goes on from it. Wall and processor seconds of everything but the measurements at the end
are counted: loading, checkpoints and the evaluations in between too. `--write` makes
`docs/results/DATE-distillation.md` and its curve.
"""

import argparse
import datetime
import json
import math
import resource
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from lmopt import Compressor, Model, Runtime
from lmopt.compression import DropBlocks
from lmopt.compression.calibration import Calibration
from lmopt.platform import machine
from lmopt.training.recovering import recover
from lmopt.training.result import TrainingProgress
from lmopt.training.steps import Distill
from lmopt.training.teacher_texts import teacher_texts

CURVE_TOKENS: Final = 2048
FINAL_TOKENS: Final = 8192
CONTEXT: Final = 512
BLOCK: Final = 256


class PieceOverError(Exception):
    """The time of this piece is over; a checkpoint has just been written."""


def read(path: str, held_out: str) -> str:
    """Read a text to learn on: of the file whose beginning is held out, the second half."""
    text = Path(path).read_text(encoding="utf-8")
    return text[len(text) // 2 :] if Path(path).resolve() == Path(held_out).resolve() else text


def used() -> dict[str, float]:
    """Seconds that this process has taken since it began."""
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return {"wall": time.monotonic() - STARTED, "cpu": spent.ru_utime + spent.ru_stime}


def pruned(model: Model, text: str, count: int, work: Path) -> Path:
    """Remove blocks, once."""
    folder = work / "pruned"
    if not folder.exists():
        calibration = Calibration([text], rows=32, row_tokens=512)
        Compressor([DropBlocks(count=count)]).compress(model, calibration=calibration).save_pretrained(folder)
    return folder


def written(source: Path, rows: int, work: Path) -> dict[str, Any]:
    """Let the teacher write, once; in bfloat16, which is quicker."""
    path = work / "written.json"
    if not path.exists():
        before = used()
        texts = (
            teacher_texts(Model.from_pretrained(source, dtype="bfloat16"), rows=rows, tokens=BLOCK)
            if rows
            else []
        )
        spent = {name: value - before[name] for name, value in used().items()}
        path.write_text(json.dumps({"rows": texts, **spent}), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def recovered(
    model: Model, folder: Path, texts: list[Any], held_out: list[int], args: argparse.Namespace
) -> None:
    """Recover, or a piece of it; notes what each piece took."""
    work: Path = args.folder
    if (work / "recovered").exists():
        return
    student = Model.from_pretrained(folder, dtype="float32")
    step = Distill(
        max_steps=args.steps,
        learning_rate=5e-4,
        batch_size=4,
        block_size=BLOCK,
        train_from=args.train_from,
        folder=work / "run",
        training={
            "bf16": True, "adam_beta2": 0.98, "save_steps": 10, "save_total_limit": 1,
            "eval_steps": max(1, args.steps // 4),
        },
    )  # fmt: skip
    first: list[int] = []

    def tell(one: TrainingProgress) -> None:
        first.append(one.step)
        print(
            f"step {one.step}/{one.total}: {one.loss:.4f}, perplexity {one.perplexity}, {used()}", flush=True
        )
        late = args.piece_seconds is not None and used()["wall"] > args.piece_seconds
        if late and one.step % 10 == 1:
            raise PieceOverError

    data = [*texts]
    try:
        result = recover(
            student, model, step, data=data, evaluation=np.array(held_out[:CURVE_TOKENS]), progress=tell
        )
    except PieceOverError:
        result = None
    with (work / "pieces.jsonl").open("a", encoding="utf-8") as pieces:
        pieces.write(json.dumps({"steps": [first[0], first[-1]], **used()}) + "\n")
    if result is None:
        raise PieceOverError
    result.model.save_pretrained(work / "recovered")
    (work / "result.json").write_text(json.dumps({**result.to_dict(), "step": result.model.recipe[-1]}))


def measured(source: Path, work: Path, held_out: list[int]) -> dict[str, Any]:
    """Measure each model on held-out text, once."""
    found: dict[str, Any] = {}
    for name, folder in (("whole", source), ("pruned", work / "pruned"), ("recovered", work / "recovered")):
        path = work / f"{name}.json"
        if not path.exists():
            with Runtime(Model.from_pretrained(folder, dtype="float32")) as runtime:
                final = runtime.perplexity(held_out, context=CONTEXT, stride=CONTEXT, tokens=FINAL_TOKENS)
                curve = runtime.perplexity(held_out, context=BLOCK, stride=BLOCK, tokens=CURVE_TOKENS)
            said = {
                "final": final.to_dict(),
                "curve": curve.to_dict(),
                "parameters": runtime.facts.parameters,
            }
            path.write_text(json.dumps(said))
        found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def shares(found: dict[str, Any]) -> tuple[float, float]:
    """Share of the gap that is closed: of the log-perplexity, and of the perplexity."""
    whole, low, back = (found[name]["final"]["value"] for name in ("whole", "pruned", "recovered"))
    return math.log(low / back) / math.log(low / whole), (low - back) / (low - whole)


def draw(path: Path, found: dict[str, Any], result: dict[str, Any]) -> None:
    """Draw held-out perplexity and the loss by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    steps = [0, *(one["step"] for one in result["evaluations"])]
    values = [
        found["pruned"]["curve"]["value"],
        *(one["perplexity"]["value"] for one in result["evaluations"]),
    ]
    panel.plot(steps, values, marker="o", color="#d9822b", label="held-out perplexity")
    whole, low = found["whole"]["curve"]["value"], values[0]
    panel.axhline(whole, color="#555555", linestyle="--", linewidth=1, label="the whole model")
    goal = math.exp(math.log(low) - 0.6 * math.log(low / whole))
    panel.axhline(
        goal, color="#555555", linestyle=":", linewidth=1, label="60 % of the log-perplexity gap closed"
    )
    panel.set(xlabel="optimiser step", ylabel="perplexity", yscale="log")
    losses = panel.twinx()
    window = max(1, len(result["losses"]) // 20)
    means = np.convolve(result["losses"], np.ones(window) / window, "valid")
    losses.plot(np.arange(window, window + len(means)), means, color="#3b6fb6", linewidth=1)
    losses.set_ylabel(f"KL to the teacher, nats a token, mean of {window} steps (blue)")
    panel.legend(frameon=False)
    figure.savefig(path)


def report(args: argparse.Namespace, found: dict[str, Any], corpus: str) -> None:
    """Print the result, and write it where asked."""
    work: Path = args.folder
    result = json.loads((work / "result.json").read_text(encoding="utf-8"))
    pieces = [json.loads(line) for line in (work / "pieces.jsonl").read_text(encoding="utf-8").splitlines()]
    teacher = json.loads((work / "written.json").read_text(encoding="utf-8"))
    wall, cpu = (sum(one[name] for one in pieces) for name in ("wall", "cpu"))
    by_log, by_value = shares(found)
    facts = machine()
    today = datetime.date.today().isoformat()
    lines = [
        f"# Recovery by distillation, {today}",
        "",
        f"- Command: `python benchmarks/distillation.py {Path(args.model).name} "
        + " ".join(f"--text {Path(one).name}" for one in args.text)
        + f" --held-out {Path(args.held_out).name} --drop {args.drop} --teacher-rows {args.teacher_rows} --steps "
        f"{args.steps}`",
        f"- Machine: {facts['cpu']}, {facts['usable_cpus']} of {facts['cores']} cores, {facts['os']}, Python "
        f"{facts['python']}.",
        f"- Learnt on: {corpus}. Held out: the first {FINAL_TOKENS:,} tokens of {Path(args.held_out).name}, in windows "
        f"of {CONTEXT}.",
        f"- Step: `{json.dumps({k: v for k, v in result['step'].items() if k != 'folder'})}`",
        "",
        "| model | weights | held-out perplexity |",
        "|---|---|---|",
        *(
            f"| {name} | {one['parameters']:,} | {one['final']['value']:.2f} +- {one['final']['stderr']:.2f} |"
            for name, one in found.items()
        ),
        "",
        f"**{by_log:.0%} of the log-perplexity gap and {by_value:.0%} of the perplexity gap are closed.**",
        "",
        "| stage | tokens | wall s | processor s |",
        "|---|---|---|---|",
        f"| teacher writes | {sum(map(len, teacher['rows'])):,} | {teacher['wall']:.0f} | {teacher['cpu']:.0f} |",
        f"| recovery, {len(pieces)} pieces | {result['tokens']:,} | {wall:.0f} | {cpu:.0f} |",
        f"| together | | {wall + teacher['wall']:.0f} | {cpu + teacher['cpu']:.0f} |",
        "",
        f"| step | KL to the teacher | held-out perplexity ({CURVE_TOKENS:,} tokens, windows of {BLOCK}) |",
        "|---|---|---|",
        f"| 0 | | {found['pruned']['curve']['value']:.2f} |",
        *(
            f"| {one['step']} | {np.mean(result['losses'][max(0, one['step'] - 10) : one['step']]):.3f} | "
            f"{one['perplexity']['value']:.2f} |"
            for one in result["evaluations"]
        ),
        f"| the whole model | | {found['whole']['curve']['value']:.2f} |",
        "",
        f"![Held-out perplexity and KL by step]({today}-distillation.svg)",
    ]
    print("\n".join(lines))
    if args.write:
        folder = Path(__file__).parents[1] / "docs" / "results"
        (folder / f"{today}-distillation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        draw(folder / f"{today}-distillation.svg", found, result)


def main() -> None:
    """Do what is left to do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--drop", type=int, default=6)
    parser.add_argument("--teacher-rows", type=int, default=192)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--train-from", type=int, default=10)
    parser.add_argument("--piece-seconds", type=float)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    given = [read(one, args.held_out) for one in args.text]
    model = Model.from_pretrained(args.model, dtype="float32")
    assert model.tokenizer is not None
    text = Path(args.held_out).read_text(encoding="utf-8")
    held_out = model.tokenizer.encode(text[: 8 * FINAL_TOKENS], add_special_tokens=False)[:FINAL_TOKENS]
    folder = pruned(model, given[0], args.drop, args.folder)
    teacher = written(args.model, args.teacher_rows, args.folder)
    try:
        recovered(model, folder, [*given, *teacher["rows"], *teacher["rows"]], held_out, args)
    except PieceOverError:
        print("PIECE OVER")
        return
    corpus = ", ".join(
        f"{Path(one).name} (its last {len(text):,} characters)"
        for one, text in zip(args.text, given, strict=True)
    )
    if teacher["rows"]:
        corpus += f", and {len(teacher['rows'])} texts that the teacher wrote, twice"
    report(args, measured(args.model, args.folder, held_out), corpus)
    print("DONE")


STARTED: Final = time.monotonic()

if __name__ == "__main__":
    main()
