"""What a corpus job costs over calling `Runtime` directly: the same rows, the same shards, the same machine.

    python benchmarks/corpus.py ARTEFACT [--rows 64] [--new-tokens 32]

Both sides generate the same tokens; the figure is the time from the first row to the last, without the opening of
the model, which both do once. The corpus job's time runs from when its worker is ready to when the last shard is
committed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from lmopt import Runtime
from lmopt.platform import machine, usable_cpus
from lmopt.scaling import batch
from lmopt.scaling.rows import row_seed

WORDS = ("The capital of", "A short story about", "How to repair", "In the year", "My favourite recipe for")


def main() -> None:
    """Run both and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artefact")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--per-shard", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    prompts = [f"{WORDS[n % len(WORDS)]} {n}" for n in range(given.rows)]
    options = {"max_new_tokens": given.new_tokens, "do_sample": False, "eos_token_id": None}
    direct, corpus, same = [], [], True
    for _ in range(given.rounds):
        with Runtime(given.artefact, threads=usable_cpus()) as runtime:
            began, texts = time.perf_counter(), []
            for first in range(0, given.rows, given.per_shard):
                some = prompts[first : first + given.per_shard]
                seeds = [row_seed(0, first + n) for n in range(len(some))]
                texts += [one.text for one in runtime.generate(some, seed=seeds, **options)]
            direct.append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory() as folder:
            marks: list[float] = []

            def tell(stage: str, done: int, total: int, marks: list[float] = marks) -> None:
                if stage == "rows":
                    marks.append(time.perf_counter())

            found = batch(
                given.artefact,
                prompts,
                Path(folder) / "out",
                rows_per_shard=given.per_shard,
                progress=tell,
                **options,
            )
            # The first is told before the worker starts, the second when it is ready.
            corpus.append(marks[-1] - marks[1])
            same = same and [row["output"]["text"] for row in found.rows()] == texts
    overhead = min(corpus) / min(direct) - 1
    figures = {"direct_s": direct, "corpus_s": corpus, "overhead": overhead, "same_text": same}
    print(json.dumps({**figures, "rows": given.rows, "new_tokens": given.new_tokens, "machine": machine()}))


if __name__ == "__main__":
    main()
