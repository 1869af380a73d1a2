import math

import numpy as np
import pytest
from defects import healthy
from small_decoder import Config, Decoder, oracle

from lmopt.errors import ContextLengthError, InputError, TokenIdError
from lmopt.evaluation.perplexity import perplexity

IDS = np.random.default_rng(5).integers(0, 96, 101).tolist()


def by_the_book(ids, context, stride, bos=None):
    """The reference protocol, a window at a time, as lmopt's published figures were measured."""
    logits = oracle(Config(), healthy().weights)
    losses, previous = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = ([bos] if bos is not None else []) + ids[begin:end]
        new = end - previous
        scores = logits(np.array(window))[:-1].astype(float)
        every = [
            float(np.log(np.exp(row).sum()) - row[token])
            for row, token in zip(scores, window[1:], strict=True)
        ]
        losses += every[-new:] if new <= len(every) else every
        previous = end
        if end == len(ids):
            break
    return losses


@pytest.mark.parametrize(
    ("context", "stride", "bos"),
    [
        (16, 16, None),
        (16, 8, None),
        (16, 5, 1),
        (16, 16, 1),
        (20, 20, None),
        (101, 101, None),
        (200, 7, None),
        (10, 1, None),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_protocol(context, stride, bos, batch):
    losses = by_the_book(IDS, context, stride, bos)
    got = perplexity(healthy(), IDS, context=context, stride=stride, bos_token_id=bos, batch=batch)
    assert got.tokens_scored == len(losses)
    assert got.mean_nll == pytest.approx(np.mean(losses), abs=1e-5)
    assert got.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert got.stderr == pytest.approx(got.value * np.std(losses, ddof=1) / math.sqrt(len(losses)), rel=1e-4)
    assert (got.tokens, got.context, got.stride) == (101, context, stride)


def test_how_many_tokens_are_scored():
    # 4096 tokens in windows of 512 score 4088 (assets.md, section 4): each window loses its first.
    ids = IDS * 6
    assert perplexity(healthy(), ids[:512], context=64, stride=64).tokens_scored == 512 - 8
    assert perplexity(healthy(), ids[:512], context=64, stride=32).tokens_scored == 511
    assert perplexity(healthy(), ids[:512], context=64, stride=64, bos_token_id=1).tokens_scored == 512
    # a last window of a single token has nothing to score
    assert perplexity(healthy(), ids[:65], context=64, stride=64).tokens_scored == 63


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    class Uniform(Decoder):
        def forward(self, input_ids, lengths, state, **options):
            return np.zeros((*input_ids.shape, 96), np.float32), state

    got = perplexity(Uniform(Config()), IDS, context=32, stride=32)
    assert got.value == pytest.approx(96)
    assert got.stderr == pytest.approx(0, abs=1e-9)


def test_progress_reaches_its_total():
    calls = []
    perplexity(healthy(), IDS, context=16, stride=16, batch=2, progress=lambda *call: calls.append(call))
    assert calls == [(2, 7), (4, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("ids", "options", "error"),
    [
        ([1, 96], {}, TokenIdError),
        ([-1, 5], {}, TokenIdError),
        ([1], {}, InputError),
        ([[1, 2]], {}, InputError),
        (IDS, {"stride": 0}, InputError),
        (IDS, {"context": 8, "stride": 9}, InputError),
        (IDS, {"context": 1, "stride": 1}, InputError),
        (IDS * 4, {"context": 257, "stride": 257}, ContextLengthError),
        (IDS * 4, {"context": 256, "stride": 256, "bos_token_id": 1}, ContextLengthError),
    ],
)
def test_requests_that_make_no_sense(ids, options, error):
    with pytest.raises(error):
        perplexity(healthy(), ids, **options)
