"""Where ONNX Runtime spends the time of an exported model, operator by operator.

    python benchmarks/operators.py ARTEFACT [--prompt 512] [--new 32] [--rounds 3] [--threads N] [--json FILE]

The engine is lmopt's own, with ONNX Runtime's profiler on, which adds some microseconds a node: shares are to be
read, not tokens a second. Products with weights are told apart by the weight that they read.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmopt
from lmopt.evaluation.speed import random_prompts, run_lap
from lmopt.platform import machine


@contextmanager
def profiled() -> Iterator[Path]:
    """Switch the profiler of every session on that is made meanwhile; gives the folder of what it writes."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    usual = onnxruntime.SessionOptions
    with tempfile.TemporaryDirectory(prefix="lmopt-profile-") as name:

        def options() -> Any:
            made = usual()
            made.enable_profiling = True
            made.profile_file_prefix = str(Path(name) / "ort")
            return made

        onnxruntime.SessionOptions = options
        try:
            yield Path(name)
        finally:
            onnxruntime.SessionOptions = usual


def runs(events: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """Sort the kernels of a profile into runs: label to microseconds and nodes of each."""
    whole = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    found: list[dict[str, list[float]]] = [defaultdict(lambda: [0.0, 0]) for _ in whole]
    kernels = sorted(
        (e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")),
        key=lambda e: e["ts"],
    )
    place = 0
    for one in kernels:
        while place < len(whole) and one["ts"] > whole[place][1]:
            place += 1
        if place == len(whole):
            break
        if one["ts"] >= whole[place][0]:
            part = found[place][label(one)]
            part[0] += one["dur"]
            part[1] += 1
    for one, (start, end) in zip(found, whole, strict=True):
        spent = sum(part[0] for part in one.values())
        one["(between the kernels)"] = [end - start - spent, 0]
    return found


def label(event: dict[str, Any]) -> str:
    """Name a kernel: its operator, and for products which of the block's."""
    operator = event["args"]["op_name"]
    name = event["name"].removesuffix("_kernel_time")
    if "MatMul" in operator or operator == "Gemm":
        part = re.findall(r"(qkv|q_proj|k_proj|v_proj|o_proj|gate_up|gate|up_proj|down|head|embed)", name)
        return f"{operator} {part[-1]}" if part else operator
    return str(operator)


def main() -> None:
    """Profile, and print a table a phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate, at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with profiled() as folder:
        with lmopt.Runtime(asked.artefact, backend="onnxruntime", threads=asked.threads) as runtime:
            prompts = random_prompts(runtime.facts, [asked.prompt])
            for _ in range(asked.rounds + 1):
                run_lap(runtime.engine, prompts, asked.new)
        events = [event for file in folder.glob("*.json") for event in json.loads(file.read_text())]
    per_lap = asked.new
    laps = runs(events)[-asked.rounds * per_lap :]
    phases = {
        f"reading {asked.prompt} tokens": laps[::per_lap],
        "one token": [one for number, one in enumerate(laps) if number % per_lap],
    }
    result: dict[str, Any] = {"machine": machine(), "artefact": asked.artefact.name, "phases": {}}
    print(json.dumps(result["machine"]))
    for phase, several in phases.items():
        names = sorted({name for one in several for name in one})
        rows = {
            name: (
                statistics.median(one[name][0] if name in one else 0.0 for one in several),
                max(int(one[name][1]) if name in one else 0 for one in several),
            )
            for name in names
        }
        total = sum(row[0] for row in rows.values())
        result["phases"][phase] = {
            name: {"us": us, "nodes": nodes, "share": us / total} for name, (us, nodes) in rows.items()
        }
        print(f"\n{phase}: {total / 1e3:.2f} ms\n")
        print("| operator | nodes | µs | share |\n|---|---:|---:|---:|")
        for name, (us, nodes) in sorted(rows.items(), key=lambda row: -row[1][0]):
            if us / total >= 0.003:
                print(f"| {name} | {nodes} | {us:.0f} | {us / total:.1%} |")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
