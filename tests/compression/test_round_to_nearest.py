"""The step `Quantize`: which weight gets which form."""

import json

import pytest

from lmopt.compression import Quantize
from lmopt.compression.round_to_nearest import Form
from lmopt.errors import UnsupportedOptionError


def test_parts_have_their_own_bits() -> None:
    step = Quantize(bits=4, group_size=64, embedding=None, head=8)
    assert step.form("a", "linear") == Form(4, 64, True, scale_bits=16)
    assert step.form("b", "embedding") is None
    assert step.form("c", "head") == Form(8, 64, True, scale_bits=16)


def test_the_last_override_that_matches_counts() -> None:
    overrides = {"layers.*": {"bits": 8}, "*.down": {"symmetric": False}, "layers.1.*": None}
    step = Quantize(overrides=overrides)
    assert step.form("layers.0.up", "linear") == Form(8, 32, True, scale_bits=16)
    assert step.form("layers.0.down", "linear") == Form(8, 32, False, scale_bits=16)
    assert step.form("layers.1.down", "linear") is None
    assert step.form("other", "linear") == Form(4, 32, True, scale_bits=16)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"group_size": 3},
        {"head": 16},
        {"scale_bits": 8},
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


def test_bytes_of_a_form_are_those_of_its_arrays() -> None:
    # 5 rows of 3 groups (the last padded): codes, then scales in 4 or 2 bytes, then the zero.
    codes = 5 * 3 * 32 // 2
    assert Form(4, 32, True).nbytes(5, 70) == codes + 15 * 4
    assert Form(4, 32, True, scale_bits=16).nbytes(5, 70) == codes + 15 * 2
    assert Form(4, 32, False, scale_bits=16).nbytes(5, 70) == codes + 15 * 3
    assert Form(4, 32, False, scale_bits=16, offset=True).nbytes(5, 70) == codes + 15 * 4
    assert Form(4, 32, False, offset=True).nbytes(5, 70) == codes + 15 * 8
