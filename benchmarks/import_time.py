"""How long `import lmopt` takes, and what it brings in.

    python benchmarks/import_time.py [--rounds 20] [--json FILE]

Each round is a fresh interpreter that times the import itself; a bare interpreter's start is not part
of it. The first rounds warm the disk's cache and do not count.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lmopt.evaluation import Figure
from lmopt.platform import machine

_HEAVY = ("torch", "onnx", "onnxruntime", "transformers", "tokenizers", "numpy")
_PROGRAM = """
import json, sys, time
began = time.perf_counter()
{statement}
took = time.perf_counter() - began
print(json.dumps([took * 1e3, [name for name in {heavy} if name in sys.modules]]))
"""
STATEMENTS = (
    "import lmopt",
    "import lmopt; lmopt.Runtime",
    "import lmopt; lmopt.Model",
    "from lmopt.cli import main",
)


def run(rounds: int, warm_up: int = 2) -> dict[str, Any]:
    """Time each statement in fresh interpreters, statement by statement in turn.

    Args:
        rounds: Rounds that count.
        warm_up: Rounds before them.

    Returns:
        Plain values: `machine`, `load_average`, `milliseconds` and `modules` by statement.
    """
    before = os.getloadavg()
    laps: dict[str, list[float]] = {one: [] for one in STATEMENTS}
    modules: dict[str, list[str]] = {}
    for turn in range(warm_up + rounds):
        for statement in STATEMENTS:
            program = _PROGRAM.format(statement=statement, heavy=_HEAVY)
            said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
            took, modules[statement] = json.loads(said.stdout)
            if turn >= warm_up:
                laps[statement].append(took)
    return {
        "machine": machine(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "milliseconds": laps,
        "modules": modules,
    }


def main() -> None:
    """Measure, and print a table or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    asked = parser.parse_args()
    result = run(asked.rounds)
    for statement, laps in result["milliseconds"].items():
        brought = ", ".join(result["modules"][statement]) or "nothing heavy"
        print(f"{statement:30} {Figure.of(laps)} ms; brings {brought}")
    print(f"median (least .. most) of {asked.rounds} fresh interpreters")
    print(f"load average {result['load_average']}; {result['machine']}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
