"""Hessians that can be inverted."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest

from lmopt.compression.hessian import DampedWarning, check_damping, damped
from lmopt.compression.statistics import Statistics
from lmopt.errors import UnsupportedOptionError


@pytest.mark.parametrize("columns", [1, 3, 128, 300])
def test_the_factor_is_that_of_the_inverse(columns: int, correlated: Callable[..., Statistics]) -> None:
    gram = correlated(columns, tokens=1000).gram
    before = gram.copy()
    hessian, factor = damped(gram, 0.1, 0.2, "w")
    mean = np.diagonal(gram).mean()
    expected = 0.8 * gram + np.diag(0.2 * np.diagonal(gram) + 0.1 * mean)
    assert np.allclose(hessian, expected, rtol=1e-5)
    assert np.array_equal(factor, np.triu(factor))
    inverse = np.linalg.inv(expected.astype(np.float64))
    assert np.allclose(factor.T.astype(np.float64) @ factor, inverse, atol=1e-5 * np.abs(inverse).max())
    assert np.array_equal(gram, before)


def test_an_input_that_is_always_zero_depends_on_none(correlated: Callable[..., Statistics]) -> None:
    gram = correlated(6).gram.copy()
    gram[2] = gram[:, 2] = 0
    hessian, factor = damped(gram, 0.1, 0, "w")
    assert hessian[2, 2] == pytest.approx(1.1 * np.diagonal(gram)[[0, 1, 3, 4, 5]].mean(), rel=1e-5)
    assert np.count_nonzero(hessian[2]) == np.count_nonzero(factor[2]) == np.count_nonzero(factor[:, 2]) == 1
    hessian, _ = damped(np.zeros((4, 4), np.float32), 0.1, 0, "w")
    assert np.allclose(hessian, 1.1 * np.eye(4))


def test_a_singular_hessian_is_damped_and_it_is_said(correlated: Callable[..., Statistics]) -> None:
    gram = correlated(60, tokens=10).gram  # ten tokens span ten of sixty directions
    with pytest.warns(DampedWarning, match=r"layers\.0: .* raised from 0 to 0\.000"):
        hessian, factor = damped(gram, 0, 0, "layers.0")
    identity = factor.T.astype(np.float64) @ factor @ hessian
    assert np.allclose(identity, np.eye(60), atol=0.05)


def test_what_only_rounding_keeps_from_being_singular_is_damped() -> None:
    gram = np.ones((2, 2), np.float32)
    gram[1, 1] += np.finfo(np.float32).eps
    np.linalg.cholesky(gram.astype(np.float64))
    with pytest.warns(DampedWarning):
        _, factor = damped(gram, 0, 0, "w")
    assert np.abs(factor).max() < 100


def test_a_sound_hessian_is_damped_no_more_than_asked(correlated: Callable[..., Statistics]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        damped(correlated(60, tokens=10).gram, 0.1, 0.2, "w")
        damped(correlated(60, tokens=1000).gram, 0, 0, "w")


@pytest.mark.parametrize(("damping", "shrinkage"), [(-1, 0), (np.inf, 0), (True, 0), ("a", 0), (0, 1.5)])
def test_impossible_shares_are_refused(damping: float, shrinkage: float) -> None:
    with pytest.raises(UnsupportedOptionError):
        check_damping(damping, shrinkage)
