"""The space, estimates from headers, texts, and the workload's checks."""

from pathlib import Path

import pytest

from lmopt.compression import AWQ, GPTQ, Cast, Mixed, Quantize, save_recipe
from lmopt.errors import ArtifactNotFoundError, InputError, UnknownPluginError, UnsupportedOptionError
from lmopt.evaluation import Figure
from lmopt.registry import backends
from lmopt.spec import BackendSpec, Capabilities
from lmopt.tuning.estimating import estimate
from lmopt.tuning.probe import Probe
from lmopt.tuning.space import Candidate, Space, default_recipes, find_routes, given_recipes, thread_counts
from lmopt.tuning.texts import lay_out
from lmopt.tuning.weights import read_shape
from lmopt.tuning.workload import Workload


@pytest.fixture(scope="module")
def space() -> Space:
    recipes = default_recipes(stored=False, quantized=False, calibrated=True)
    routes, _ = find_routes(device="cpu", only=["torch", "onnxruntime"])
    return Space(tuple(recipes), tuple(routes), (2, 1))


def test_a_sampler_can_reach_every_point(space: Space) -> None:
    for candidate in space.candidates():
        answers = space.answers(candidate)
        assert space.suggest(lambda name, choices, known=answers: known[name]) == candidate


def test_choices_of_a_parameter_are_the_same_wherever_it_is_asked(space: Space) -> None:
    seen: dict[str, list] = {}

    def ask(candidate: Candidate) -> None:
        answers = space.answers(candidate)

        def answer(name, choices):
            assert seen.setdefault(name, list(choices)) == list(choices)  # optuna insists on it
            return answers[name]

        space.suggest(answer)

    for candidate in space.candidates():
        ask(candidate)


def test_names_tell_points_apart(space: Space) -> None:
    names = [one.name for one in space.candidates()]
    assert len(names) == len(set(names))


def test_asymmetric_4_bits_in_small_groups_are_in_it(space: Space) -> None:
    wanted = Quantize(bits=4, group_size=32, symmetric=False).to_dict()
    assert any(recipe.steps == (wanted,) for recipe in space.recipes)


def test_casts_only_go_where_the_engine_computes_in_them(space: Space) -> None:
    half = [one for one in space.candidates() if one.recipe.name == "bfloat16"]
    assert {one.route.backend for one in half} == {"torch"}


def test_a_plug_in_is_a_route_by_what_it_declares() -> None:
    spec = BackendSpec("stranger", "nowhere:engine", Capabilities(formats=("onnx",)))
    backends.register(spec)
    try:
        routes, without = find_routes(device="cpu")
    finally:
        backends.unregister("stranger")
    own = [one for one in routes if one.backend == "stranger"]
    assert [(one.exporter, one.target, dict(one.options)) for one in own] == [("onnx", "portable", {})]
    assert not own[0].takes_threads
    assert "tensorrt" in without


def test_unknown_engines_are_refused() -> None:
    with pytest.raises(UnknownPluginError):
        find_routes(device="cpu", only=["onnxruntim"])


def test_recipes_of_the_user_are_steps_or_files(tmp_path: Path) -> None:
    save_recipe([GPTQ(bits=4)], tmp_path / "mine.json")
    found = given_recipes([tmp_path / "mine.json"])
    assert found[0].name == "mine"
    assert found[0].calibrated
    assert given_recipes({"a": Quantize()})[0].steps == (Quantize().to_dict(),)
    for wrong in ([Quantize()], {"a": []}, {"a": [Quantize]}):
        with pytest.raises(UnsupportedOptionError):
            given_recipes(wrong)


@pytest.mark.parametrize("given", [(), (0,), (2.0,)])
def test_impossible_thread_counts_are_refused(given) -> None:
    with pytest.raises(UnsupportedOptionError):
        thread_counts(given)


def test_shapes_come_from_headers(tiny: Path) -> None:
    shape = read_shape(tiny)
    assert shape.parameters == 97 * 64 * 2 + 64 + 64 * 64 * 2 + 32 * 64 * 2
    assert shape.stored_bytes == 4 * shape.parameters
    assert shape.cache_values == 2 * 1 * 2 * 16
    parts = {one.part: one.path for one in shape.matrices}
    assert parts["embedding"] == "model.embed_tokens"
    assert parts["head"] == "lm_head"
    assert shape.read_per_token(()) == 4 * (shape.parameters - 97 * 64)


def test_bytes_after_a_recipe(tiny: Path) -> None:
    shape = read_shape(tiny)
    linear, rest = 64 * 64 * 2 + 32 * 64 * 2 + 97 * 64 * 2, 64
    assert shape.bytes_after([Quantize(bits=8, group_size=32)]) == linear * (8 + 16 / 32) / 8 + 4 * rest
    assert shape.bytes_after([Cast()]) == 2 * (linear + rest)
    assert (
        shape.bytes_after([Cast(), Quantize(bits=8, group_size=32)]) == linear * (8 + 16 / 32) / 8 + 2 * rest
    )
    assert shape.bytes_after([AWQ(), Quantize(bits=4)]) is not None
    assert shape.bytes_after([Mixed()]) is None


def test_the_estimate_of_a_real_model_is_what_was_written(smollm2: Path) -> None:
    # docs/results/2026-11-24-compression.md: 143.0 MB in 8 bits, groups of 64, with 32-bit scales.
    shape = read_shape(smollm2)
    assert shape.bytes_after([Quantize(bits=8, group_size=64, scale_bits=32)]) == pytest.approx(
        143.0e6, rel=0.001
    )


def test_a_folder_without_safetensors_has_no_shape(tmp_path: Path) -> None:
    with pytest.raises(ArtifactNotFoundError, match="safetensors"):
        read_shape(tmp_path)
    with pytest.raises(ArtifactNotFoundError, match="local-dir"):
        read_shape("owner/name")


def test_estimates_are_bounds_from_below(space: Space, tiny: Path) -> None:
    shape = read_shape(tiny)
    probe = Probe(Figure(1e9, 1e9, 1e9), Figure(1e9, 1e9, 1e9), 2, 0.1)
    eight = next(one for one in space.candidates() if one.recipe.name == "rtn 8-bit g32 symmetric")
    found = estimate(eight, shape, probe)
    steps = eight.recipe.made()
    assert found["artifact_bytes"] < shape.bytes_after(steps)
    assert found["token_p50_ms"] == pytest.approx(1e3 * shape.read_per_token(steps) / 3e9)
    assert estimate(eight, None, probe) == {}


def test_one_long_text_is_cut_into_halves_that_do_not_overlap(tmp_path: Path) -> None:
    words = "".join(f"<{n}>" for n in range(12_000))
    found = lay_out([words], None, tmp_path)
    assert found.score.read_text() + found.calibration.read_text() == words
    assert "first half" in found.origins["quality"]


def test_a_short_text_is_scored_whole_and_the_model_writes_the_other(tmp_path: Path) -> None:
    found = lay_out(["word " * 1000], None, tmp_path)
    assert found.calibration is None
    assert "written by the model" in found.origins["calibration"]


def test_without_a_text_pythons_reference_is_scored_and_it_says_so(tmp_path: Path) -> None:
    found = lay_out(None, None, tmp_path)
    assert found.score.stat().st_size > 100_000
    assert "--text" in found.origins["quality"]


def test_texts_that_prove_nothing_are_refused(tmp_path: Path) -> None:
    words = ["word " * 1000]
    with pytest.raises(InputError, match="calibration text is the text to score"):
        lay_out(words, words, tmp_path)
    with pytest.raises(InputError, match="characters"):
        lay_out(["short"], None, tmp_path)
    with pytest.raises(InputError, match="no text file"):
        lay_out(tmp_path / "missing.txt", None, tmp_path)


@pytest.mark.parametrize("given", [{"new_tokens": 1}, {"rounds": 0}, {"starts": True}, {"score_tokens": 2.5}])
def test_impossible_workloads_are_refused(given) -> None:
    with pytest.raises(UnsupportedOptionError):
        Workload(**given)
