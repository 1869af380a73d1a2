"""Prints what the loop costs per token beside the engine; nothing is asserted about time."""

import time

import numpy as np
import pytest
from generation_fakes import ConstantEngine

from lmopt.generation import GenerationConfig, generate


class Replay(ConstantEngine):
    """Hands out logits that it has ready."""

    def forward(self, input_ids, lengths, state, *, last_only=False):
        state.lengths = state.lengths + lengths
        return np.repeat(self.logits[None, None], lengths.size, axis=0), state


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"do_sample": True, "top_k": 0, "top_p": 0.9}, {"logprobs": 5}],
    ids=repr,
)
def test_overhead_at_a_vocabulary_of_49152(options, capsys):
    generator = np.random.default_rng(0)
    logits = -1.3 * np.log(generator.permutation(49152) + 1.0) + generator.normal(size=49152) / 2
    engine = Replay(logits=logits.astype(np.float32))
    config = GenerationConfig(max_new_tokens=100, seed=0, **options)
    generate(engine, [[1, 2]], config)
    start = time.thread_time()
    ((found,),) = generate(engine, [[1, 2]], config)
    spent = (time.thread_time() - start) / 100
    with capsys.disabled():
        print(f"\ngeneration overhead, {options or 'greedy'}: {spent * 1e6:.0f} us of CPU time a token")  # noqa: T201
    assert len(found.token_ids) == 100
