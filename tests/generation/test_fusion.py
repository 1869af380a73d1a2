"""A language model that has a say in each token, or chooses among texts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lmopt
from lmopt.errors import ContextLengthError, UnsupportedOptionError, VocabularyMismatchError
from lmopt.generation.fusion import Fusion
from lmopt.generation.rescoring import rescored
from lmopt.generation.results import Generation
from lmopt.testing.models import VOCAB_SIZE, tiny_gpt, tiny_llama, tiny_lstm
from lmopt.types import ModelFacts

PROMPT, START, WEIGHT = [5, 9, 3], 1, 0.4


def logprobs(module: torch.nn.Module, row: list[int]) -> np.ndarray:
    """What follows a row, computed by the module alone."""
    with torch.no_grad():
        found = module(torch.tensor([row]))
    logits = found.logits if hasattr(found, "logits") else found[0]
    return logits[0, -1].double().log_softmax(0).numpy()


@pytest.mark.parametrize("make", [tiny_gpt, tiny_lstm], ids=["gpt", "lstm"])
def test_beams_find_what_trying_everything_finds(make) -> None:
    model, companion = tiny_llama(), make()
    first = logprobs(model, PROMPT) + WEIGHT * logprobs(companion, [START])
    both = np.stack([
        first[a] + logprobs(model, [*PROMPT, a]) + WEIGHT * logprobs(companion, [START, a])
        for a in range(VOCAB_SIZE)
    ])  # fmt: skip
    best = np.argsort(-both.ravel())[:3]
    with (
        lmopt.Runtime(lmopt.Model.from_module(model)) as rt,
        lmopt.Runtime(lmopt.Model.from_module(companion)) as lm,
    ):
        found = rt.generate(
            PROMPT,
            max_new_tokens=2,
            num_beams=VOCAB_SIZE,  # so many that nothing is lost on the way
            num_return_sequences=3,
            length_penalty=0.0,
            eos_token_id=None,
            logprobs=True,
            fusion=Fusion(lm.engine, WEIGHT, START),
        )
        greedy = rt.generate(
            PROMPT, max_new_tokens=1, eos_token_id=None, fusion=Fusion(lm.engine, WEIGHT, START)
        )
    assert [one.token_ids for one in found] == [[n // VOCAB_SIZE, n % VOCAB_SIZE] for n in best]
    np.testing.assert_allclose([one.score for one in found], both.ravel()[best], atol=1e-4)
    # What the model itself thinks of the tokens has no part of the language model.
    a, b = found[0].token_ids
    own = [logprobs(model, PROMPT)[a], logprobs(model, [*PROMPT, a])[b]]
    np.testing.assert_allclose(found[0].logprobs, own, atol=1e-4)
    assert greedy.token_ids == [int(first.argmax())]


def test_many_prompts_give_what_each_gives_alone() -> None:
    prompts = [[5], [9, 3, 7, 2], [11, 4]]
    options = {"max_new_tokens": 6, "num_beams": 3, "eos_token_id": [8, 20]}
    with (
        lmopt.Runtime(lmopt.Model.from_module(tiny_llama())) as rt,
        lmopt.Runtime(lmopt.Model.from_module(tiny_lstm())) as lm,
    ):
        say = Fusion(lm.engine, WEIGHT, START)
        together = rt.generate(prompts, fusion=say, **options)
        alone = [rt.generate(one, fusion=say, **options) for one in prompts]
        silent = rt.generate(prompts, fusion=Fusion(lm.engine, 0.0, START), **options)
        plain = rt.generate(prompts, **options)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.token_ids for one in silent] == [one.token_ids for one in plain]
    assert [one.token_ids for one in together] != [one.token_ids for one in plain]


def test_what_cannot_be_fused_is_refused() -> None:
    with (
        lmopt.Runtime(lmopt.Model.from_module(tiny_llama())) as rt,
        lmopt.Runtime(lmopt.Model.from_module(tiny_gpt())) as short,
    ):
        small = SimpleNamespace(facts=ModelFacts(vocab_size=50))
        with pytest.raises(VocabularyMismatchError, match=f"has 50 tokens, the model {VOCAB_SIZE}"):
            rt.generate(PROMPT, max_new_tokens=2, fusion=Fusion(small, 0.3, START))
        with pytest.raises(UnsupportedOptionError, match="fusion with sampling"):
            rt.generate(PROMPT, do_sample=True, fusion=Fusion(short.engine, 0.3, START))
        brief = SimpleNamespace(facts=ModelFacts(VOCAB_SIZE, context_length=8))
        with pytest.raises(ContextLengthError, match="the language model reads 8"):
            rt.generate(PROMPT, max_new_tokens=9, fusion=Fusion(brief, 0.3, START))
        for wrong in (-0.1, float("nan"), "much"):
            with pytest.raises(UnsupportedOptionError, match="weight is"):
                Fusion(short.engine, wrong, START)


class Words:
    """A language model that knows one word, and whose scores are given."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.tokenizer = SimpleNamespace(
            encode=lambda text, add_special_tokens: [len(word) for word in text.split()]
        )
        self.generation_defaults = {"eos_token_id": [7, 8]}

    def score(self, rows):
        self.asked += rows
        return [np.full(len(row) - 1, -1.0 if 3 in row else -5.0) for row in rows]


def test_a_language_model_chooses_by_the_sum() -> None:
    def said(text: str, score: float, tokens: int) -> Generation:
        return Generation(
            [1] * tokens, text, "stop", 1, score=score / tokens
        )  # as a search with length_penalty=1 says it

    lm = Words()
    found = [[said("four", -1.0, 2), said("one", -3.0, 3), said("", -4.0, 1)], [said("word", -1.0, 1)]]
    ordered = rescored(found, lm, weight=1.0, word_bonus=0.5, length_penalty=1.0)
    assert [(one.text, one.score) for one in ordered[0]] == [
        ("one", pytest.approx(-3 - 1 + 0.5)),
        ("", pytest.approx(-4.0)),
        ("four", pytest.approx(-1 - 5 + 0.5)),
    ]
    assert ordered[1][0].text == "word"
    assert lm.asked == [[7, 4], [7, 3], [7, 4]]
    assert rescored(found, lm, weight=0.0, word_bonus=0.0, length_penalty=1.0)[0][0].text == "four"
    with pytest.raises(UnsupportedOptionError, match=r"^weight=-1"):
        rescored(found, lm, weight=-1, word_bonus=0.0, length_penalty=1.0)
