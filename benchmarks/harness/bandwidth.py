"""How fast this machine reads memory.

A token of batch 1 reads every weight once and does two operations a weight: its time is at least the
bytes of the weights over the read bandwidth. The probe reads a gigabyte, far more than any cache. Of
three ways (torch's product of a float32 matrix with a vector, which is what decoding does; NumPy's, and
NumPy's maximum, in threads on a share of the rows each) and all thread counts, the fastest counts: a roof
is the most that was seen.

It runs as a program of its own, under the same conditions as what is timed: `bandwidth.py THREADS ...`
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

_BYTES = 1 << 30
_WIDTH = 4096
_REPEATS = 8


def read_bandwidth(
    thread_counts: list[int], before_start: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Measure the read bandwidth in a process of its own.

    Args:
        thread_counts: Numbers of threads to try.
        before_start: Called in the new process, to give it the same priority as what is timed.

    Returns:
        `bytes_per_s` (the fastest), `by` (which way), and every way's own in `all`.
    """
    done = subprocess.run(
        [sys.executable, __file__, *map(str, thread_counts)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # NumPy's products: one thread each, we have our own
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        preexec_fn=before_start,
    )
    found: dict[str, float] = json.loads(done.stdout)
    best = max(found, key=lambda name: found[name])
    return {"bytes_per_s": found[best], "by": best, "all": found}


def _measure(thread_counts: list[int]) -> dict[str, float]:
    import numpy as np
    import torch

    # Random numbers, so that nothing below us can merge equal pages.
    matrix = np.random.default_rng(0).random((_BYTES // 4 // _WIDTH, _WIDTH), np.float32)
    vector = np.ones(_WIDTH, np.float32)
    left, right = torch.from_numpy(matrix), torch.from_numpy(vector)
    found = {}
    for threads in thread_counts:
        parts = np.array_split(matrix, threads * 8)
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(threads) as pool:
            ways: dict[str, Callable[[], object]] = {
                "NumPy maximum": partial(_map, pool, np.max, parts),
                "NumPy product": partial(_map, pool, vector.__rmatmul__, parts),
                "torch product": partial(torch.mv, left, right),
            }
            for name, way in ways.items():
                found[f"{name}, {threads} threads"] = _BYTES / min(_lap(way) for _ in range(_REPEATS))
    return found


def _map(pool: ThreadPoolExecutor, what: Callable[[Any], object], parts: list[Any]) -> list[object]:
    return list(pool.map(what, parts))


def _lap(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(_measure([int(one) for one in sys.argv[1:]])))
