"""What the machine can do, measured in a second or two: bytes read from memory and products a second."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from lmopt.evaluation import Figure
from lmopt.platform import memory_available_bytes, usable_cpus

_BYTES: Final = 1 << 28
_WIDTH: Final = 4096
_ORDER: Final = 1024
_ROUNDS: Final = 5


@dataclass(frozen=True, slots=True)
class Probe:
    """Rates of the machine.

    Attributes:
        bandwidth_bytes_per_s: Bytes read from memory a second by all threads, with arrays that no cache holds.
        flops_per_s: Float32 operations a second of a large matrix product by NumPy's BLAS.
        threads: Threads that read.
        seconds: How long the probe took.
    """

    bandwidth_bytes_per_s: Figure
    flops_per_s: Figure
    threads: int
    seconds: float


def measure_machine(threads: int | None = None) -> Probe:
    """Measure memory bandwidth and float32 throughput with NumPy alone.

    Every thread multiplies a matrix of its own with a vector, which is what decoding does: the memory is what it
    waits for. What else runs can only slow it down, so the fastest round says most.

    Args:
        threads: Threads that read; `None` takes as many as may run at once.
    """
    began = time.perf_counter()
    count = threads or usable_cpus()
    free = memory_available_bytes()
    size = _BYTES if free is None else min(_BYTES, max(1 << 24, free // 8))
    vector = np.ones(_WIDTH, np.float32)
    arrays = [np.ones((size // count // 4 // _WIDTH, _WIDTH), np.float32) for _ in range(count)]
    rates = []
    with ThreadPoolExecutor(count) as pool:
        for _ in range(_ROUNDS + 1):
            start = time.perf_counter()
            list(pool.map(lambda one: one @ vector, arrays))
            rates.append(sum(one.nbytes for one in arrays) / (time.perf_counter() - start))
    del arrays
    left = np.ones((_ORDER, _ORDER), np.float32)
    flops = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        left @ left
        flops.append(2 * _ORDER**3 / (time.perf_counter() - start))
    return Probe(Figure.of(rates[1:]), Figure.of(flops), count, time.perf_counter() - began)
