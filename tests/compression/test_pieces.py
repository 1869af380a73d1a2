"""Scores of pieces, and the regression by which what stays makes up for what goes."""

import numpy as np
import pytest

from lmopt.compression.pieces import activation_importance, highest, importance, refit, weight_importance
from lmopt.compression.statistics import Statistics
from lmopt.errors import InputError
from lmopt.types import FloatArray


def statistics(inputs: FloatArray) -> Statistics:
    return Statistics.of(inputs)


def random(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_channel_scores_what_it_adds_to_the_output() -> None:
    weight, inputs = random(6, 4), random(50, 4, seed=1)
    scores = activation_importance(weight, np.arange(4), statistics(inputs))
    for channel in range(4):
        added = np.outer(inputs[:, channel], weight[:, channel])
        assert scores[channel] == pytest.approx(np.sqrt(np.square(added).sum(1).mean()), rel=1e-4)


def test_a_piece_scores_the_energy_of_its_inputs() -> None:
    weight, inputs, pieces = random(6, 4), random(50, 4, seed=1), np.array([1, 0, 1, 0])
    single = activation_importance(weight, np.arange(4), statistics(inputs))
    both = activation_importance(weight, pieces, statistics(inputs))
    assert both == pytest.approx(np.sqrt([single[1] ** 2 + single[3] ** 2, single[0] ** 2 + single[2] ** 2]))


def test_weights_alone_score_by_the_product_of_their_norms() -> None:
    weight, rows = random(6, 3), random(3, 5, seed=1)
    rows[1] = 0
    scores = weight_importance(weight, np.arange(3), [(np.linalg.norm(rows, axis=1), np.array([0, 1, 2]))])
    assert scores[1] == 0
    expected = np.linalg.norm(weight, axis=0) * np.linalg.norm(rows, axis=1)
    assert scores[0] / scores[2] == pytest.approx(expected[0] / expected[2], rel=1e-5)


def test_a_refit_is_the_best_there_is() -> None:
    mixing = random(8, 8, seed=3)
    inputs, weight, kept = random(400, 8) @ mixing, random(5, 8, seed=1), np.array([0, 2, 3, 7])
    made = refit(weight, statistics(inputs).gram, kept, 0.0)
    best, *_ = np.linalg.lstsq(inputs[:, kept].astype(np.float64), (inputs @ weight.T).astype(np.float64))
    assert made == pytest.approx(best.T, abs=1e-3)
    plain = np.square(inputs[:, kept] @ weight[:, kept].T - inputs @ weight.T).sum()
    assert np.square(inputs[:, kept] @ made.T - inputs @ weight.T).sum() < 0.7 * plain


def test_what_was_always_zero_changes_nothing() -> None:
    inputs, weight = random(100, 6), random(4, 6, seed=1)
    inputs[:, [1, 4]] = 0
    kept = np.array([0, 2, 3, 5])
    assert np.array_equal(refit(weight, statistics(inputs).gram, kept, 0.01), weight[:, kept])
    silent = refit(weight, np.zeros((6, 6), np.float32), kept, 0.01)
    assert np.array_equal(silent, weight[:, kept])


def test_damping_keeps_weights_where_they_were() -> None:
    inputs, weight, kept = random(100, 6), random(4, 6, seed=1), np.array([0, 2, 3])
    gram = statistics(inputs).gram
    moved = [np.abs(refit(weight, gram, kept, one) - weight[:, kept]).max() for one in (0.0, 1.0, 1e6)]
    assert moved[0] > moved[1] > 100 * moved[2]


def test_the_highest_stay_in_order() -> None:
    assert highest(np.array([1, 5, 3, 5, 0], np.float32), 3).tolist() == [1, 2, 3]
    assert highest(np.array([2, 2, 2], np.float32), 2).tolist() == [0, 1]


@pytest.mark.parametrize("where", ["weight", "rows"])
def test_damaged_weights_are_named(where: str) -> None:
    weight, norms = random(3, 2), np.ones(2, np.float32)
    (weight if where == "weight" else norms)[0] = np.nan
    with pytest.raises(InputError, match=r"mlp\.down.*NaN"):
        importance(
            "activation",
            weight,
            np.arange(2),
            [(norms, np.arange(2))],
            statistics(np.ones((3, 2), np.float32)),
            "mlp.down",
        )


def test_activations_need_texts() -> None:
    with pytest.raises(InputError, match="calibration"):
        importance("activation", random(3, 2), np.arange(2), [], None, "mlp.down")
