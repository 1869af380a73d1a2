"""Row 24: one runtime for many threads, and closing it under them."""

import concurrent.futures
import threading

import pytest
from seeded_requests import make

from lmopt.errors import ClosedError

pytestmark = pytest.mark.slow


def test_thirty_two_threads_give_what_one_gives(runtime, full_sweep):
    each = 100 if full_sweep else 4
    served = make(32)
    expected = [runtime.generate(prompt, config) for prompt, config in served]

    def work(thread):
        wrong = 0
        for number in range(each):
            place = (7 * thread + number) % len(served)
            prompt, config = served[place]
            # Every third request comes as a batch, every other as one.
            found = (
                runtime.generate([prompt, prompt], config)[1]
                if number % 3 == 2
                else runtime.generate(prompt, config)
            )
            wrong += found != expected[place]
        return wrong

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(work, range(32))) == 0


def test_closing_ends_what_others_are_doing(opener, full_sweep):
    for number in range(20 if full_sweep else 3):
        with opener() as shared:
            started = threading.Barrier(5)
            ends = []

            def work(shared=shared, started=started, ends=ends):
                seen = iter([started.wait])
                try:
                    while True:
                        shared.generate(
                            [5, 6, 7],
                            max_new_tokens=60,
                            eos_token_id=None,
                            on_token=lambda token: next(seen, bool)(),
                        )
                except ClosedError as error:
                    ends.append(str(error))

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            started.wait(60)  # all are in the middle of a generation
            shared.close()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
        assert len(ends) == 4, number
        assert all("open a new" in one for one in ends)


def test_opening_and_closing_in_parallel(opener, runtime, full_sweep):
    expected = runtime.generate([5, 6, 7], max_new_tokens=5)

    def work(_):
        with opener() as own:
            return own.generate([5, 6, 7], max_new_tokens=5) == expected

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(80 if full_sweep else 8)))
