"""The rules by which a Whisper model writes times are those of transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from lmopt.errors import TokenIdError, UnsupportedOptionError
from lmopt.generation import GenerationConfig
from lmopt.generation.history import History
from lmopt.generation.processors import build_processors

VOCABULARY, END, NO_TIMES = 60, 30, 40
FIRST = NO_TIMES + 1


@pytest.mark.parametrize("latest", [None, 5])
def test_the_same_tokens_are_banned(latest: int | None) -> None:
    config = GenerationConfig(
        return_timestamps=True,
        no_timestamps_token_id=NO_TIMES,
        eos_token_id=END,
        max_initial_timestamp_index=latest,
    )
    (ours,) = build_processors(config, VOCABULARY)
    theirs = WhisperTimeStampLogitsProcessor(
        SimpleNamespace(
            no_timestamps_token_id=NO_TIMES,
            eos_token_id=END,
            bos_token_id=None,
            max_initial_timestamp_index=latest,
        ),
        begin_index=2,
    )
    random = np.random.default_rng(0)
    banned = 0
    for _ in range(500):
        prompt = random.integers(0, END, 2)
        times = np.sort(random.integers(FIRST, VOCABULARY, 4))
        new = [token for time in times for token in (time, *random.integers(0, END, random.integers(0, 3)))]
        new = new[: random.integers(0, len(new) + 1)]
        history = History.start(prompt, 20)
        for token in new:
            history.append(int(token))
        scores = random.normal(0, 2, VOCABULARY).astype(np.float32)
        # Now times, now text is the likelier.
        scores[FIRST:] += random.normal(0, 3)
        expected = theirs(torch.tensor([[*prompt, *new]]), torch.tensor(scores)[None])[0].numpy()
        ours(scores, history)
        assert np.array_equal(scores, expected)
        banned += int(np.isinf(scores).sum())
    assert banned > 500 * 10


def test_what_it_needs() -> None:
    with pytest.raises(UnsupportedOptionError, match="needs no_timestamps_token_id and eos_token_id"):
        GenerationConfig(return_timestamps=True, eos_token_id=2)
    with pytest.raises(UnsupportedOptionError, match="needs no_timestamps_token_id and eos_token_id"):
        GenerationConfig(return_timestamps=True, no_timestamps_token_id=4)
    config = GenerationConfig(return_timestamps=True, no_timestamps_token_id=59, eos_token_id=2)
    with pytest.raises(TokenIdError, match="no_timestamps_token_id names id 60"):
        build_processors(config, VOCABULARY)
    assert not build_processors(GenerationConfig(no_timestamps_token_id=4, eos_token_id=2), VOCABULARY)
