"""SHA-256 of many files at once; hashlib releases the interpreter lock, so threads help."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from lmopt.safefiles import open_regular

THREADS: Final = 8
"""Most threads that hash at once; more only compete for memory bandwidth."""

Result = TypeVar("Result")


def file_hash(path: Path) -> tuple[str, int]:
    """Return the hexadecimal SHA-256 of a file and the number of bytes that were hashed."""
    with open_regular(path) as (file, _):
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


def in_parallel(work: Callable[[str], Result], names: Iterable[str]) -> list[Result]:
    """Call `work` on every name in a few threads; the first error is raised."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1:
        return [work(name) for name in names]
    with ThreadPoolExecutor(min(THREADS, cores), "lmopt-hash") as pool:
        return list(pool.map(work, names))
