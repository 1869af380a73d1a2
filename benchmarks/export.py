"""Seconds and peak memory of an export with its parity gate, beside the size of the weights.

    python benchmarks/export.py [MODEL] [--rounds 1] [--json FILE]

Each round is a process of its own, which loads the model, exports it, and reads its own peaks: the
kernel's `VmHWM` from the start of the export on, and `ru_maxrss` over its whole life.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lmopt.artifact import cache_folder
from lmopt.cli.assets import fetch_smollm2
from lmopt.evaluation import Figure, PeakMemory, folder_size_bytes
from lmopt.platform import machine


def one_round(source: str, folder: str) -> dict[str, Any]:
    """Load and export in this process.

    Args:
        source: What `lmopt.Model.from_pretrained` takes.
        folder: Where the artefact goes.

    Returns:
        Seconds of loading and of each stage, and bytes; plain values.
    """
    import lmopt

    stages: dict[str, float] = {}

    def tell(stage: str, done: int, total: int) -> None:
        stages[stage] = time.perf_counter() - began

    start = time.perf_counter()
    model = lmopt.Model.from_pretrained(source, dtype="float32")
    loaded = time.perf_counter() - start
    weights = sum(one.numel() * one.element_size() for one in model.module.parameters())
    began = time.perf_counter()
    with PeakMemory() as memory:
        artifact = lmopt.Exporter("onnx").export(model, folder, progress=tell)
    return {
        "load_s": loaded,
        "export_and_gate_s": time.perf_counter() - began,
        "stage_ends_s": stages,
        "weights_bytes": weights,
        "artifact_bytes": folder_size_bytes(artifact.path),
        "before_export_bytes": memory.before_bytes,
        "peak_of_export_bytes": memory.peak_bytes,
        "peak_is_exact": memory.exact,
        "peak_of_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run(source: str, rounds: int) -> dict[str, Any]:
    """Measure rounds in processes of their own.

    Args:
        source: What `lmopt.Model.from_pretrained` takes.
        rounds: Number of processes, one after the other.

    Returns:
        Plain values: `machine`, `load_average`, `rounds`.
    """
    before = os.getloadavg()
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, source, "--round", str(Path(folder) / "onnx")]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(said.splitlines()[-1]))
    return {
        "machine": machine(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "rounds": found,
    }


def main() -> None:
    """Measure, and print a summary or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M, fetched as by `lmopt demo`")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--round", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.round:
        print(json.dumps(one_round(asked.model, asked.round)))
        return
    result = run(asked.model or str(fetch_smollm2(cache_folder())), asked.rounds)
    rounds = result["rounds"]
    weights = rounds[0]["weights_bytes"]
    print(f"weights {weights / 1e6:.0f} MB, artefact {rounds[0]['artifact_bytes'] / 1e6:.0f} MB")
    print(f"load            {Figure.of([one['load_s'] for one in rounds])} s")
    print(f"export and gate {Figure.of([one['export_and_gate_s'] for one in rounds])} s")
    print(f"stages end at   {rounds[-1]['stage_ends_s']} s")
    for name in ("before_export", "peak_of_export", "peak_of_process"):
        figure = Figure.of([one[f"{name}_bytes"] / weights for one in rounds])
        print(f"{name.replace('_', ' '):15} {figure} x the weights")
    print(f"median (least .. most) of {asked.rounds}; peak exact: {rounds[0]['peak_is_exact']}")
    print(f"load average {result['load_average']}; {result['machine']}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
