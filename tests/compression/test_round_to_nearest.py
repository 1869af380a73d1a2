"""The step `Quantize`: which weight gets which form."""

import json

import pytest

from lmopt.compression import Quantize
from lmopt.compression.round_to_nearest import Form
from lmopt.errors import UnsupportedOptionError


def test_parts_have_their_own_bits() -> None:
    step = Quantize(bits=4, group_size=64, embedding=None, head=8)
    assert step.form("a", "linear") == Form(4, 64, True)
    assert step.form("b", "embedding") is None
    assert step.form("c", "head") == Form(8, 64, True)


def test_the_last_override_that_matches_counts() -> None:
    overrides = {"layers.*": {"bits": 8}, "*.down": {"symmetric": False}, "layers.1.*": None}
    step = Quantize(overrides=overrides)
    assert step.form("layers.0.up", "linear") == Form(8, 32, True)
    assert step.form("layers.0.down", "linear") == Form(8, 32, False)
    assert step.form("layers.1.down", "linear") is None
    assert step.form("other", "linear") == Form(4, 32, True)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"group_size": 3},
        {"head": 16},
        {"overrides": {"a": {"bits": 99}}},
        {"overrides": {"a": {"width": 4}}},
    ],
)
def test_impossible_steps_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedOptionError):
        Quantize(**fields)  # type: ignore[arg-type]


def test_names_that_match_nothing_are_told_with_near_ones() -> None:
    step = Quantize(overrides={"model.layers.0.mlp.downproj": None})
    with pytest.raises(UnsupportedOptionError, match="down_proj"):
        step.check_names(["model.layers.0.mlp.down_proj", "lm_head"])


def test_a_step_is_plain_data() -> None:
    step = Quantize(bits=8, overrides={"a*": None, "b": {"bits": 4}})
    told = json.loads(json.dumps(step.to_dict()))
    assert told.pop("step") == "rtn"
    assert Quantize(**told) == step
