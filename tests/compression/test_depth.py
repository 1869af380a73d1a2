"""DropBlocks: its fields, and which blocks go."""

from typing import Any

import numpy as np
import pytest

from lmopt.compression.depth import DropBlocks
from lmopt.compression.step import Step
from lmopt.errors import InputError, UnsupportedOptionError


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "exactly one"), ({"count": 1, "share": 0.1}, "exactly one"), ({"count": 0}, "count is 0"),
        ({"count": True}, "count is True"), ({"count": 1.0}, "count is 1.0"), ({"share": 0}, "share is 0"),
        ({"share": 1}, "share is 1"), ({"share": "a"}, "share is 'a'"),
        ({"count": 1, "score": "magic"}, "score is 'magic'"),
    ],
)  # fmt: skip
def test_impossible_fields_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=told):
        DropBlocks(**fields)


def test_it_is_a_step_and_plain_data() -> None:
    step = DropBlocks(share=0.1)
    assert isinstance(step, Step)
    assert step.to_dict() == {"step": "drop_blocks", "count": None, "share": 0.1, "score": "block-influence"}
    assert step.needs_texts


@pytest.mark.parametrize(
    ("step", "blocks", "going"), [(DropBlocks(count=3), 30, 3), (DropBlocks(share=0.1), 30, 3)]
)
def test_numbers(step: DropBlocks, blocks: int, going: int) -> None:
    assert step.number(blocks) == going


@pytest.mark.parametrize(
    "step", [DropBlocks(count=4), DropBlocks(count=9), DropBlocks(share=0.1), DropBlocks(share=0.99)]
)
def test_some_go_and_some_stay(step: DropBlocks) -> None:
    with pytest.raises(UnsupportedOptionError, match="expected 1 to 3"):
        step.number(4)


def test_the_least_influence_goes() -> None:
    assert DropBlocks(count=2).choose(np.array([0.3, 0.1, 0.5, 0.2, 0.9], np.float32)) == [1, 3]


def test_damaged_blocks_are_named() -> None:
    with pytest.raises(InputError, match="block 1"):
        DropBlocks(count=1).choose(np.array([0.3, np.nan, 0.5], np.float32))
