"""PruneHeads: its fields, and which groups stay."""

from typing import Any

import numpy as np
import pytest

from lmopt.compression.heads import PruneHeads
from lmopt.compression.step import Step
from lmopt.errors import UnsupportedOptionError


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "exactly one"), ({"share": 0.5, "keep": 1}, "exactly one"), ({"share": 0}, "share is 0"),
        ({"share": 1}, "share is 1"), ({"share": True}, "share is True"), ({"share": "half"}, "share is 'half'"),
        ({"keep": 0}, "keep is 0"), ({"keep": True}, "keep is True"), ({"keep": 1.5}, "keep is 1.5"),
        ({"keep": 1, "score": "magic"}, "score is 'magic'"), ({"keep": 1, "damping": -1}, "damping is -1"),
    ],
)  # fmt: skip
def test_impossible_fields_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UnsupportedOptionError, match=told):
        PruneHeads(**fields)


def test_it_is_a_step_and_plain_data() -> None:
    step = PruneHeads(keep=2, refit=False)
    assert isinstance(step, Step)
    assert step.to_dict() == {
        "step": "prune_heads", "share": None, "keep": 2, "score": "activation", "refit": False, "damping": 1.0,
    }  # fmt: skip
    assert step.needs_texts
    assert not PruneHeads(keep=2, score="weight", refit=False).needs_texts


def test_the_lowest_go() -> None:
    given = {"0": np.array([3, 1, 2, 4], np.float32), "1": np.array([1, 9, 8, 7], np.float32)}
    kept = PruneHeads(share=0.5).choose(given)
    assert {path: one.tolist() for path, one in kept.items()} == {"0": [0, 3], "1": [1, 2]}
    assert PruneHeads(keep=3).choose(given)["1"].tolist() == [1, 2, 3]
    assert len(PruneHeads(share=0.99).choose(given)["0"]) == 1


@pytest.mark.parametrize("step", [PruneHeads(share=0.1), PruneHeads(keep=4), PruneHeads(keep=9)])
def test_what_takes_nothing_is_refused(step: PruneHeads) -> None:
    with pytest.raises(UnsupportedOptionError, match="key-value heads"):
        step.choose({"0": np.ones(4, np.float32)})
