"""Row 26: nothing stays behind, however often a runtime is used, cancelled, opened and closed."""

import gc
import threading

import numpy as np
import pytest
from memory_watch import descriptors, resident, slope, threads

pytestmark = pytest.mark.slow
KIB = 1024


@pytest.fixture(autouse=True)
def _only_what_is_new():
    """Each reading collects garbage; what thousands of tests before left in the process is not gone through again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def grows(runtime, use, count):
    """Run `use` so often; bytes an iteration, and how many descriptors and threads are new."""
    for number in range(max(20, count // 10)):
        use(number)
    before = descriptors(), threads()
    readings = []
    for number in range(count):
        use(number)
        if number % 5 == 0:
            readings.append(resident())
    return slope(readings) / 5, descriptors() - before[0], threads() - before[1]


@pytest.fixture
def count(full_sweep):
    return 2000 if full_sweep else 150


@pytest.fixture
def limit(full_sweep):
    """Bytes an iteration. A short run sees a single page that comes late as a slope."""
    return (1 if full_sweep else 8) * KIB


def test_generations_of_varying_shapes(runtime, count, limit):
    generator = np.random.default_rng(0)
    shapes = [
        [generator.integers(3, 90, n).tolist() for n in generator.integers(1, 30, b)] for b in (1, 2, 5, 3)
    ]

    def use(number):
        runtime.generate(shapes[number % 4], max_new_tokens=1 + number % 6, do_sample=number % 2 == 0, seed=1)

    growth, files, tasks = grows(runtime, use, count)
    assert growth <= limit
    assert (files, tasks) == (0, 0)


def test_cancels(runtime, count, limit):
    def use(number):
        event = threading.Event()
        runtime.generate(
            [[5, 6], [7] * (1 + number % 20)], max_new_tokens=30, eos_token_id=None, cancel=event,
            on_token=lambda token: event.set() if token.token_id % 3 == number % 3 else None,
        )  # fmt: skip

    growth, files, tasks = grows(runtime, use, count // 10 if count > 1000 else count)
    assert growth <= limit
    assert (files, tasks) == (0, 0)


def test_opening_and_closing(opener, full_sweep):
    def use(number):
        with opener() as own:
            own.generate([5, 6, 7], max_new_tokens=2)

    # An allocator reaches its size in steps, of a megabyte and more where sessions are opened.
    for number in range(100 if full_sweep else 5):
        use(number)
    before = descriptors(), threads(), resident()
    count = 200 if full_sweep else 15
    for number in range(count):
        use(number)
    assert (descriptors() - before[0], threads() - before[1]) == (0, 0)
    assert (resident() - before[2]) / count <= (8 if full_sweep else 256) * KIB
