"""PruneChannels: its fields, and which channels stay."""

from typing import Any

import numpy as np
import pytest

from lmopt.compression.channels import PruneChannels
from lmopt.compression.step import Step
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray


def scores(*widths: int, seed: int = 0) -> dict[str, FloatArray]:
    random = np.random.default_rng(seed)
    return {str(place): random.random(width, np.float32) + 0.1 for place, width in enumerate(widths)}


@pytest.mark.parametrize(
    "fields",
    [
        {"share": 0}, {"share": 1}, {"share": 1.5}, {"share": True}, {"share": "a"}, {"share": float("nan")},
        {"score": "magic"}, {"multiple": 0}, {"multiple": 1.5}, {"damping": -1}, {"damping": float("nan")},
    ],
)  # fmt: skip
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOptionError, match=next(iter(fields))):
        PruneChannels(**fields)


def test_it_is_a_step_and_plain_data() -> None:
    step = PruneChannels(0.1, uniform=False)
    assert isinstance(step, Step)
    assert step.to_dict() == {
        "step": "prune_channels", "share": 0.1, "score": "activation", "uniform": False, "multiple": 16,
        "refit": True, "damping": 1.0,
    }  # fmt: skip


def test_texts_are_needed_where_they_are_read() -> None:
    assert PruneChannels().needs_texts
    assert PruneChannels(score="weight").needs_texts
    assert PruneChannels(refit=False).needs_texts
    assert not PruneChannels(score="weight", refit=False).needs_texts


def test_the_lowest_go_in_every_layer_alike() -> None:
    given = scores(64, 64)
    given["1"] *= 100
    kept = PruneChannels(0.25).choose(given)
    for path, places in kept.items():
        assert len(places) == 48
        assert np.all(np.diff(places) > 0)
        gone = np.setdiff1d(np.arange(64), places)
        assert given[path][gone].max() < given[path][places].min()


@pytest.mark.parametrize(("share", "width"), [(0.1, 1376), (0.25, 1152), (0.99, 16)])
def test_widths_are_whole_multiples(share: float, width: int) -> None:
    assert len(PruneChannels(share).choose(scores(1536))["0"]) == width


def test_a_share_that_takes_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="smaller multiple"):
        PruneChannels(0.1).choose(scores(64))
    assert len(PruneChannels(0.1, multiple=2).choose(scores(64))["0"]) == 58


def test_ranked_together_dead_channels_go_wherever_they_are() -> None:
    given = scores(64, 64, 64)
    given["0"][:40] = 0
    given["1"] *= 1000
    given["1"][5:13] = 0
    kept = PruneChannels(0.25, uniform=False, multiple=8).choose(given)
    assert [len(one) for one in kept.values()] == [24, 56, 64]
    assert kept["0"].tolist() == list(range(40, 64))
    assert not set(kept["1"].tolist()) & set(range(5, 13))


@pytest.mark.parametrize("seed", range(5))
def test_ranked_together_the_share_is_met_in_multiples(seed: int) -> None:
    given = {path: one**3 for path, one in scores(256, 256, 512, 128, seed=seed).items()}
    kept = PruneChannels(0.3, uniform=False).choose(given)
    widths = [len(one) for one in kept.values()]
    assert all(width % 16 == 0 and width >= 16 for width in widths)
    assert abs(sum(widths) - 0.7 * 1152) <= 16
    assert len({width / len(given[path]) for width, path in zip(widths, given, strict=True)}) > 1
