"""What a batch gains: eight prompts of unequal length at once, against the same prompts one by one.

    python benchmarks/batching.py [MODEL] [--backend NAME] [--rounds 3] [--json FILE]

MODEL is whatever `lmopt.Runtime` opens (default: SmolLM2-135M, fetched as by `lmopt demo`). Both ways go
through `Runtime.generate` on one runtime, in turn. A figure is new tokens over the whole time, prompts
included. Rows whose tokens differ between the two ways are counted: in float32 there must be none.
Peers are in `generation.py --batch 8`.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from harness.requests import request_lap
from harness.texts import Workload

import lmopt
from lmopt.artifact import cache_folder
from lmopt.cli.assets import fetch_smollm2
from lmopt.evaluation import Figure, Lap, Speed
from lmopt.evaluation.speed import random_prompts
from lmopt.generation import GenerationConfig
from lmopt.platform import machine


def run(runtime: lmopt.Runtime, *, batch: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Measure both ways.

    Args:
        runtime: Open runtime.
        batch: Prompts.
        new_tokens: New tokens of each.
        rounds: Rounds that count; one more warms up.

    Returns:
        `together` (`Speed` as plain values), `one_by_one` and `ratio` (`Figure`s of total tokens/s), and
        `rows_that_differ`.
    """
    config = GenerationConfig(max_new_tokens=new_tokens)
    longest = min(128, (runtime.facts.context_length or 1024) - new_tokens)
    lengths = Workload("", longest, new_tokens, batch).lengths
    together: list[Lap] = []
    alone: list[float] = []
    differ = 0
    for number in range(rounds + 1):
        prompts = [row.tolist() for row in random_prompts(runtime.facts, lengths, seed=number)]

        def batched(prompts: list[list[int]] = prompts) -> None:
            together.append(request_lap(runtime, prompts, config))

        def one_by_one(prompts: list[list[int]] = prompts) -> list[Any]:
            laps = [request_lap(runtime, [prompt], config) for prompt in prompts]
            alone.append(batch * new_tokens / sum(one.first_token_s + one.decode_s for one in laps))
            return [one.tokens[0] for one in laps]

        if number % 2:
            batched()
            rows = one_by_one()
        else:
            rows = one_by_one()
            batched()
        differ += sum(not np.array_equal(a, b) for a, b in zip(rows, together[-1].tokens, strict=True))
    speed = Speed.of(together[1:])
    totals = [one.tokens.size / (one.first_token_s + one.decode_s) for one in together[1:]]
    return {
        "together": speed.to_dict(),
        "one_by_one": asdict(Figure.of(alone[1:])),
        "ratio": asdict(Figure.of([a / b for a, b in zip(totals, alone[1:], strict=True)])),
        "rows_that_differ": differ,
        "rows": batch * (rounds + 1),
    }


def main() -> None:
    """Measure, and print a table or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M, fetched as by `lmopt demo`")
    parser.add_argument("--backend", help="default: as `lmopt.Runtime` chooses")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    asked = parser.parse_args()
    with lmopt.Runtime(asked.model or fetch_smollm2(cache_folder()), backend=asked.backend) as runtime:
        found = run(runtime, batch=asked.batch, new_tokens=asked.new_tokens, rounds=asked.rounds)
        report = runtime.report().actual
    print(f"{asked.batch} together: {Figure(**found['together']['total_tokens_per_s'])} tokens/s in all")
    print(f"one by one: {Figure(**found['one_by_one'])} tokens/s")
    print(f"gain: {Figure(**found['ratio'])}; median (least .. most) of {asked.rounds} rounds")
    print(f"rows whose tokens differ: {found['rows_that_differ']} of {found['rows']}")
    print(f"{report.backend}, {report.dtype}, {report.threads} threads; {machine()}")
    if asked.json:
        result = {"machine": machine(), "backend": report.backend, "dtype": report.dtype, **found}
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
