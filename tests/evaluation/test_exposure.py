"""Exposure: ranks are right, the fit agrees with the exact figure, nonsense is refused."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lmopt.errors import InputError
from lmopt.evaluation.exposure import canary_exposure, draw_secrets, exposure

VOCABULARY = 20


class Biased:
    """Gives each token a fixed log-probability, whatever stands before it."""

    facts = SimpleNamespace(vocab_size=VOCABULARY, context_length=None, source=None)
    ragged = True

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits.astype(np.float32)

    def begin(self, batch: int, **_: Any) -> Any:
        return SimpleNamespace(lengths=np.zeros(batch, np.int64))

    def forward(self, ids: np.ndarray, lengths: np.ndarray, state: Any, **_: Any) -> Any:
        return np.broadcast_to(self._logits, (*ids.shape, VOCABULARY)).copy(), state

    def select(self, state: Any, rows: np.ndarray) -> Any:
        return state


class Digits:
    """Letters 0 .. 9 are ids 10 .. 19, everything else is 1."""

    def encode(self, text: str) -> list[int]:
        return [10 + int(one) if one.isdigit() else 1 for one in text]


def favouring(*tokens: int, by: float = 8.0) -> Biased:
    logits = np.zeros(VOCABULARY)
    logits[list(tokens)] = by
    return Biased(logits)


def test_the_exact_rank_of_a_secret() -> None:
    likely = canary_exposure(favouring(17), Digits(), "code {}", "77", samples=1000)  # type: ignore[arg-type]
    assert (likely.method, likely.rank, likely.candidates, likely.space) == ("exact", 1, 99, 100)
    assert likely.bits == pytest.approx(math.log2(100))
    # Ties count against the model: all secrets alike is no exposure, however they are ordered.
    alike = canary_exposure(favouring(), Digits(), "code {}", "77", samples=1000)  # type: ignore[arg-type]
    assert (alike.rank, alike.bits) == (100, 0.0)
    # Beside 77, the 18 codes with one 7 come before those with none; 12 is among the last.
    unlikely = canary_exposure(favouring(17), Digits(), "code {}", "12", samples=1000)  # type: ignore[arg-type]
    assert unlikely.rank == 100


def test_the_fitted_figure_is_near_the_exact_one() -> None:
    model = Biased(np.random.default_rng(0).normal(size=VOCABULARY))
    for secret in ("0123", "9999", "5070", "3141"):
        exact = canary_exposure(model, Digits(), "{}", secret, samples=10**4)  # type: ignore[arg-type]
        fitted = canary_exposure(model, Digits(), "{}", secret, samples=2000)  # type: ignore[arg-type]
        assert (exact.method, fitted.method) == ("exact", "fitted")
        assert fitted.bits == pytest.approx(exact.bits, abs=1.5)


def test_a_secret_far_from_all_candidates_has_all_bits_and_no_more() -> None:
    secret, others = [1, 17, 17], [[1, a, b] for a in range(2, 16) for b in range(2, 16)]
    logits = np.random.default_rng(1).normal(scale=0.1, size=VOCABULARY)
    logits[17] = 30.0
    found = exposure(Biased(logits), secret, others, space=2**20)  # type: ignore[arg-type]
    assert (found.rank, found.bits) == (1, 20.0)
    logits[17] = -30.0
    assert exposure(Biased(logits), secret, others, space=2**20).bits == pytest.approx(0.0, abs=0.01)  # type: ignore[arg-type]


def test_candidates_are_different_secrets_and_never_the_own() -> None:
    few = draw_secrets("042", "0123456789", 300, seed=1)
    assert len(set(few)) == 300
    assert "042" not in few
    assert all(len(one) == 3 for one in few)
    assert few == draw_secrets("042", "0123456789", 300, seed=1)
    assert sorted([*draw_secrets("ab", "ab", 99), "ab"]) == ["aa", "ab", "ba", "bb"]


@pytest.mark.parametrize(
    ("template", "secret", "alphabet", "words"),
    [
        ("no place", "12", "0123456789", "needs one {}"),
        ("{} {}", "12", "0123456789", "needs one {}"),
        ("{}", "1x", "0123456789", "letter 'x'"),
        ("{}", "", "0123456789", "at least one letter"),
        ("{}", "1", "1", "an alphabet two"),
    ],
)
def test_canaries_that_make_no_sense(template: str, secret: str, alphabet: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        canary_exposure(favouring(), Digits(), template, secret, alphabet=alphabet)  # type: ignore[arg-type]


def test_too_few_candidates_are_refused() -> None:
    with pytest.raises(InputError, match="at least 100"):
        exposure(favouring(), [1, 2], [[1, 3]] * 5, space=1000)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 candidates"):
        exposure(favouring(), [1, 2], [])  # type: ignore[arg-type]
