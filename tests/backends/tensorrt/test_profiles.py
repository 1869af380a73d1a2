"""Ranges are checked before TensorRT sees them: it takes any name, and says little of impossible ones."""

import pytest

from lmopt.backends.tensorrt.building import BuildOptions, compile_network, open_network
from lmopt.backends.tensorrt.engine_cache import graph_of
from lmopt.backends.tensorrt.profiles import Profile, add_profiles, default_profiles
from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.types import ModelFacts, SourceFacts, TensorSpec

GROWING = (
    TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),
    TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
    TensorSpec("past_key_values.0.key", "float16", ("batch_size", 2, "past_sequence_length", 8)),
)


def test_the_defaults_follow_the_declared_axes():
    limits = {"max_batch": 3, "max_sequence": 512, "max_past": None}
    prefill, decode = default_profiles(GROWING, ModelFacts(10, 128), **limits)
    assert prefill == Profile("prefill", (1, 1, 3), (1, 64, 128), (0, 0, 128))
    assert decode == Profile("decode", (1, 1, 3), (1, 1, 1), (0, 64, 128))
    assert prefill.shapes(GROWING[1]) == ((1, 1), (1, 64), (3, 256))
    assert decode.shapes(GROWING[2])[2] == (3, 2, 128, 8)
    assert default_profiles(GROWING, ModelFacts(10, 10**6), **limits)[1].past[2] == 4096
    assert default_profiles(GROWING, ModelFacts(10, 10**6), **{**limits, "max_past": 9000})[1].past[2] == 9000
    for one in default_profiles(GROWING[:1], ModelFacts(10), **limits):
        assert one.past == (0, 0, 0)


def test_sources_have_a_range_of_their_own():
    reads = TensorSpec("input_ids", "int64", ("batch_size", "encoder_sequence_length"))
    holds = TensorSpec("past_key_values.0.encoder.key", "float32", ("batch_size", 2, *reads.shape[1:], 8))
    facts = ModelFacts(10, source=SourceFacts("ids", 0, 10, 100))
    limits = {"max_batch": 2, "max_sequence": 8, "max_past": 8}
    assert default_profiles((reads,), facts, **limits) == (
        Profile("encode", (1, 1, 2), (1, 1, 1), (0, 0, 0), (1, 50, 100)),
    )
    for one in default_profiles((*GROWING, holds), facts, **limits, max_source=6):
        assert one.shapes(holds) == ((1, 2, 1, 8), (1, 2, 3, 8), (2, 2, 6, 8))
    unbound = ModelFacts(10, source=SourceFacts("ids", 0, 10))
    assert default_profiles((reads,), unbound, **limits)[0].source == (1, 256, 512)
    # Of a decoder without a source nothing of it is said.
    assert default_profiles(GROWING, facts, **limits)[0].source == (1, 1, 1)


def test_what_a_profile_covers():
    one = Profile("p", (1, 2, 4), (1, 8, 16), (0, 0, 32))
    assert one.covers(4, 16, 32)
    assert one.covers(1, 1, 0)
    assert not one.covers(5, 16, 32)
    assert not one.covers(4, 17, 32)
    assert not one.covers(4, 16, 33)


@pytest.mark.parametrize(
    "bad",
    [
        {"batch": (0, 1, 1)},
        {"batch": (2, 1, 3)},
        {"sequence": (1, 9, 8)},
        {"sequence": (1, 1)},
        {"past": (-1, 0, 1)},
        {"past": (0, 0.5, 1)},
        {"batch": "123"},
        {"source": (0, 1, 2)},
    ],
)
def test_impossible_ranges_are_refused_by_name(bad):
    with pytest.raises(UnsupportedOptionError, match=next(iter(bad))):
        Profile(**{"name": "p", "batch": (1, 1, 1), "sequence": (1, 1, 1), "past": (0, 0, 0), **bad})


@pytest.mark.parametrize("limit", ["max_batch", "max_sequence", "max_past", "max_source"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_impossible_limits_are_refused(limit, value):
    limits = {"max_batch": 1, "max_sequence": 8, "max_past": 8, limit: value}
    with pytest.raises(UnsupportedOptionError, match=limit):
        default_profiles(GROWING, ModelFacts(10, 128), **limits)


def test_axes_and_tensors_that_no_decoder_has_are_refused(exported):
    one = Profile("p", (1, 1, 1), (1, 1, 1), (0, 0, 0))
    with pytest.raises(UnsupportedError, match="'frames'"):
        one.shapes(TensorSpec("x", "int64", ("batch_size", "frames")))
    with open_network(graph_of(exported("lstm", "float32"))) as (network, _):
        config = network.builder.create_builder_config()
        # TensorRT itself takes the unknown name without a word.
        assert network.builder.create_optimization_profile().set_shape("no_such", (1,), (1,), (1,)) is None
        with pytest.raises(UnsupportedError, match="no_such"):
            add_profiles(
                network.builder, config, [TensorSpec("no_such", "int64", (1,))], ("input_ids",), [one]
            )
        with pytest.raises(UnsupportedOptionError, match="at least one"):
            add_profiles(network.builder, config, [], (), [])


def test_own_profiles_are_built_in_their_order(exported):
    artifact = exported("lstm", "float32")
    profiles = tuple(
        {"name": f"p{n}", "batch": (1, n, n), "sequence": (1, 1, 4), "past": (0, 0, 0)} for n in (1, 2, 3)
    )
    options = BuildOptions("tensorrt_rtx", ("8.9",), profiles=profiles)
    with open_network(graph_of(artifact)) as (network, prepared):
        plan = compile_network(network, prepared, options, facts=artifact.facts)
    assert [one.name for one in plan.profiles] == ["p1", "p2", "p3"]
    assert plan.profiles[2].batch == (1, 3, 3)
