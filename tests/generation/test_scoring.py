"""Scores of given rows: right, whatever the parts and batches they are read in."""

import numpy as np
import pytest
from generation_fakes import HashEngine
from generation_hf import PROMPTS, HfEngine

from lmopt.errors import ContextLengthError, EmptyPromptError, TokenIdError
from lmopt.generation import GenerationConfig, generate, score

ROWS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10], [11, 12, 13, 14, 15], [16, 17, 18], [19] * 12, [1, 2]]


def reference(row):
    engine = HashEngine()
    logits, _ = engine.forward(np.array([row]), np.array([len(row)]), engine.begin(1))
    logs = logits[0].astype(np.float64)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    return logs[np.arange(len(row) - 1), row[1:]]


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "logit_bytes"), [(8, 2**20), (3, 2**20), (1, 1), (8, 1), (4, 4 * 50 * 4 * 3)]
)
def test_equals_the_reference(ragged, batch_size, logit_bytes):
    engine = HashEngine(ragged=ragged)
    found = score(engine, ROWS, batch_size=batch_size, logit_bytes=logit_bytes)
    for row, scores in zip(ROWS, found, strict=True):
        assert scores.dtype == np.float32
        assert scores.shape == (len(row) - 1,)
        assert np.allclose(scores, reference(row), atol=1e-6)
    assert max(batch for batch, _ in engine.calls) <= batch_size
    if logit_bytes < 2**20:
        assert all(batch * width * 50 * 4 <= max(logit_bytes, batch * 200) for batch, width in engine.calls)
    else:
        assert len(engine.calls) <= 7


def test_equals_transformers(llama):
    import torch

    for prompt, scores in zip(PROMPTS, score(HfEngine(llama), PROMPTS), strict=True):
        row = torch.tensor([prompt])
        with torch.inference_mode():
            logs = llama(row).logits[0, :-1].log_softmax(-1)
        assert np.allclose(scores, logs.gather(1, row[0, 1:, None])[:, 0], atol=1e-5)


def test_equals_logprobs_of_generate():
    ((found,),) = generate(HashEngine(), [[1, 2]], GenerationConfig(max_new_tokens=6, logprobs=True))
    (scores,) = score(HashEngine(), [[1, 2, *found.token_ids]])
    assert np.allclose(scores[1:], found.logprobs, atol=1e-6)


def test_bad_rows():
    assert score(HashEngine(), []) == []
    with pytest.raises(EmptyPromptError, match="row 1"):
        score(HashEngine(), [[1], []])
    with pytest.raises(TokenIdError, match="row 0 holds id 50"):
        score(HashEngine(), [[50]])
    assert score(HashEngine(context_length=3), [[1, 2, 3]])[0].size == 2
    with pytest.raises(ContextLengthError, match="row 0 has 4 tokens"):
        score(HashEngine(context_length=3), [[1, 2, 3, 4]])
