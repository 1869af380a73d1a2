"""What the methods have in common that set single weights to zero."""

import json

import numpy as np
import pytest

from lmopt.compression.magnitude import Magnitude
from lmopt.compression.pruning import Sparsity, least, least_of_window
from lmopt.compression.sparsegpt import SparseGPT
from lmopt.compression.wanda import Wanda
from lmopt.errors import InputError, UnsupportedOptionError

STEPS = [Magnitude, Wanda, SparseGPT]


@pytest.mark.parametrize("step", STEPS)
def test_only_linears_are_pruned_unless_an_override_names_others(step: type[Magnitude]) -> None:
    made = step(0.3, overrides={"embed": {"sparsity": 0.1}})
    assert made.form("layers.0.up", "linear") == Sparsity(0.3)
    assert made.form("head", "head") is None
    assert made.form("other", "embedding") is None
    assert made.form("embed", "embedding") == Sparsity(0.1)


def test_the_last_override_that_matches_counts() -> None:
    overrides = {
        "layers.0.*": {"pattern": "2:4"},
        "*.down": {"sparsity": 0.6},
        "layers.1.*": None,
        "layers.2.*": {"pattern": "1:4"},
    }
    step = Magnitude(0.25, overrides=overrides)
    assert step.form("layers.0.up", "linear") == Sparsity(0.5, "2:4")
    assert step.form("layers.0.down", "linear") == Sparsity(0.6)
    assert step.form("layers.1.down", "linear") is None
    assert step.form("layers.2.down", "linear") == Sparsity(0.75, "1:4")
    assert step.form("other", "linear") == Sparsity(0.25)
    assert Magnitude(0.5, "2:4", {"a": {"sparsity": 0.1}}).form("a", "linear") == Sparsity(0.1)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"sparsity": True},
        {"pattern": "4:2"},
        {"pattern": "0:4"},
        {"pattern": "2-4"},
        {"pattern": (2, 4)},
        {"pattern": "1:4"},
        {"overrides": {"a": {"sparsity": 2}}},
        {"overrides": {"a": {"pattern": "2:2"}}},
        {"overrides": {"a": {"bits": 4}}},
        {"overrides": {"a": {"sparsity": 0.1, "pattern": "2:4"}}},
    ],
)
def test_impossible_steps_are_refused(step: type[Magnitude], fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedOptionError):
        step(**fields)  # type: ignore[arg-type]


def test_a_contradiction_is_told_with_what_would_agree() -> None:
    with pytest.raises(UnsupportedOptionError, match=r"give sparsity=0\.75"):
        Magnitude(0.5, "1:4")


def test_names_that_match_nothing_are_told_with_near_ones() -> None:
    step = Wanda(overrides={"model.layers.0.mlp.downproj": None})
    with pytest.raises(UnsupportedOptionError, match="down_proj"):
        step.check_names(["model.layers.0.mlp.down_proj", "lm_head"])
    step.check_names(["model.layers.0.mlp.downproj"])


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_plain_data(step: type[Magnitude]) -> None:
    made = step(0.5, "2:4", overrides={"a*": None, "b": {"sparsity": 0.1}})
    told = json.loads(json.dumps(made.to_dict()))
    assert told.pop("step") == step.name == step.__name__.lower()
    assert step(**told) == made


def test_of_equal_scores_the_first_are_taken() -> None:
    scores = np.array([[1, 0, 0, 0], [2, 2, 2, 2], [3, 1, 2, 0]], np.float32)
    assert least(scores, 2).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
        [False, True, False, True],
    ]
    assert not least(scores, 0).any()
    many = np.tile(np.array([1, 0], np.float32), (1, 500))
    assert np.flatnonzero(least(many, 300)).tolist() == list(range(1, 600, 2))
    assert least_of_window(scores, Sparsity(0.5, "1:2"), "w").tolist() == [
        [False, True, True, False],
        [True, False, True, False],
        [False, True, False, True],
    ]


def test_a_pattern_must_divide_the_inputs() -> None:
    with pytest.raises(InputError, match=r"layers\.0 has 6 inputs"):
        least_of_window(np.zeros((2, 6), np.float32), Sparsity(0.5, "2:4"), "layers.0")
