"""GPTQ against loops that follow the paper word by word, and against all possible codes."""

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest

from lmopt.compression import gptq
from lmopt.compression.gptq import GPTQ
from lmopt.compression.hessian import DampedWarning
from lmopt.compression.layout import Grid, QuantizedArray, quantize, unpack
from lmopt.compression.round_to_nearest import Form
from lmopt.compression.statistics import Statistics
from lmopt.errors import InputError, ShapeError, UnsupportedOptionError

Correlated = Callable[..., Statistics]
PAPER = {"damping": 0.01, "shrinkage": 0.0, "search": False, "refine": 0}


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def loss(values: np.ndarray, matrix: np.ndarray, gram: np.ndarray) -> float:
    error = values.astype(np.float64) - matrix
    return float(np.vdot(error @ gram, error))


def naive(matrix: np.ndarray, plain: QuantizedArray, hessian: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Round column by column; the inverse of what is left is computed anew each time (OBQ's update)."""
    left, result = matrix.astype(np.float64), np.zeros(matrix.shape)
    for turn, column in enumerate(order):
        rest = order[turn:]
        inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
        group = column // plain.grid.group_size
        scale = plain.scales[:, group].astype(np.float64)
        zero = plain.grid.midpoint if plain.zero_points is None else plain.zero_points[:, group].astype(int)
        codes = np.clip(np.rint(left[:, column] / scale) + zero, 0, 2**plain.grid.bits - 1)
        result[:, column] = (codes - zero) * scale
        error = (left[:, column] - result[:, column]) / inverse[0, 0]
        left[:, rest] -= np.outer(error, inverse[0])
    return result


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "columns", "size"), [(4, 70, 16), (3, 64, 32), (8, 40, 64), (4, 100, 32)])
def test_codes_are_those_of_the_naive_loop(
    bits: int, columns: int, size: int, symmetric: bool, act_order: bool, correlated: Correlated
) -> None:
    matrix, statistics = weight(20, columns), correlated(columns)
    gram = statistics.gram.astype(np.float64)
    hessian = gram + 0.01 * np.diagonal(gram).mean() * np.eye(columns)
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(columns)
    plain = quantize(matrix, bits, size, symmetric=symmetric)
    expected = naive(matrix, plain, hessian, order)
    step = GPTQ(act_order=act_order, block_size=24, **PAPER)
    found = step.apply(matrix, Form(bits, size, symmetric), "w", statistics)
    assert found.grid == plain.grid
    assert np.array_equal(found.scales, plain.scales), "groups are those of the columns' places"
    # Float32 may round a tie the other way; such a row goes another way from there on.
    rows = np.isclose(found.values(), expected, atol=1e-5).all(1)
    assert rows.mean() >= 0.9
    assert loss(found.values(), matrix, hessian) == pytest.approx(loss(expected, matrix, hessian), rel=0.02)


@pytest.mark.parametrize(
    ("bits", "size", "columns", "symmetric"),
    [(2, 32, 96, False), (3, 32, 50, True), (4, 64, 96, True), (4, 32, 50, False), (8, 128, 96, True)],
)
def test_each_part_lowers_the_error(
    bits: int, size: int, columns: int, symmetric: bool, correlated: Correlated
) -> None:
    matrix, statistics = weight(48, columns), correlated(columns)
    form = Form(bits, size, symmetric)

    def error(step: GPTQ) -> float:
        return loss(step.apply(matrix, form, "w", statistics).values(), matrix, statistics.gram)

    plain = loss(quantize(matrix, bits, size, symmetric=symmetric).values(), matrix, statistics.gram)
    paper = error(GPTQ(**PAPER))
    searched = error(GPTQ(**{**PAPER, "search": True}))
    refined = error(GPTQ(**{**PAPER, "search": True, "refine": 1}))
    assert paper < 0.7 * plain
    assert refined < 0.99 * searched
    assert refined < 0.95 * paper
    assert error(GPTQ(**{**PAPER, "search": True, "refine": 3})) <= refined
    assert error(GPTQ()) < 0.7 * plain


def test_no_row_beats_the_best_of_all_codes_and_most_meet_it(correlated: Correlated) -> None:
    statistics, matrix = correlated(6, tokens=50), weight(40, 6)
    gram = statistics.gram.astype(np.float64)
    plain = quantize(matrix, 2, 8)
    found = GPTQ(**PAPER).apply(matrix, Form(2, 8, True), "w", statistics).values()
    every = np.array(list(itertools.product(range(-2, 2), repeat=6)), np.float64)
    met = 0
    for row in range(40):
        errors = every * plain.scales[row, 0] - matrix[row]
        best = np.einsum("ck,kl,cl->c", errors, gram, errors).min()
        own = loss(found[row], matrix[row], gram)
        nearest = loss(plain.values()[row], matrix[row], gram)
        assert own >= best * 0.999
        met += own <= best * 1.05
        assert own <= nearest * 2
    assert met >= 20


def test_refined_scales_are_the_best_for_their_codes(correlated: Correlated) -> None:
    statistics, matrix = correlated(64), weight(12, 64)
    array = GPTQ(damping=0.1, shrinkage=0.2).apply(matrix, Form(4, 16, True), "w", statistics)
    gram = statistics.gram.astype(np.float64)
    diagonal = np.diag(np.diagonal(gram))
    hessian = 0.8 * gram + 0.2 * diagonal + 0.1 * np.diagonal(gram).mean() * np.eye(64)
    root = np.linalg.cholesky(hessian).T
    codes = unpack(array.codes, array.grid).astype(np.float64) - 8
    for row in range(12):
        design = np.zeros((64, 4))
        for group in range(4):
            design[16 * group : 16 * group + 16, group] = codes[row, group]
        best = np.linalg.lstsq(root @ design, root @ matrix[row].astype(np.float64))[0]
        assert np.allclose(array.scales[row], best, rtol=2e-3, atol=1e-5)


def test_codes_of_refined_columns_are_the_best_while_others_stay(correlated: Correlated) -> None:
    statistics, matrix = correlated(64), weight(12, 64)
    work = GPTQ(damping=0.1, shrinkage=0.2, refine=40)
    array = work.apply(matrix, Form(4, 16, False), "w", statistics)
    gram = statistics.gram.astype(np.float64)
    hessian = 0.8 * gram + np.diag(0.2 * np.diagonal(gram) + 0.1 * np.diagonal(gram).mean())
    values = array.values().astype(np.float64)
    slopes = (matrix - values) @ hessian
    steps = np.repeat(np.abs(array.scales), 16, axis=1)
    codes = unpack(array.codes, array.grid).reshape(12, 64)
    ideal = slopes / np.diagonal(hessian)
    inner = (codes > 0) & (codes < 15)
    assert (np.abs(ideal)[inner] <= 0.5001 * steps[inner]).all()


@pytest.mark.parametrize("act_order", [True, False])
def test_inputs_that_do_not_correlate_leave_rounding_as_it_is(act_order: bool) -> None:
    random = np.random.default_rng(0)
    gram = np.diag(random.random(40) + 0.1).astype(np.float32)
    row = np.ones(40, np.float32)
    matrix = weight(9, 40)
    step = GPTQ(act_order=act_order, **PAPER)
    found = step.apply(matrix, Form(4, 16, False), "w", Statistics(gram, row, row, 10))
    plain = quantize(matrix, 4, 16, symmetric=False)
    assert np.array_equal(found.codes, plain.codes)
    assert np.array_equal(found.values(), plain.values())


def test_believing_no_correlation_leaves_searched_rounding_as_it_is(correlated: Correlated) -> None:
    matrix, statistics = weight(9, 40), correlated(40)
    step = GPTQ(shrinkage=1, refine=0, search=False)
    found = step.apply(matrix, Form(4, 16, True), "w", statistics)
    assert np.array_equal(found.codes, quantize(matrix, 4, 16).codes)


def test_blocks_are_a_matter_of_speed(correlated: Correlated) -> None:
    matrix, statistics = weight(30, 100), correlated(100)
    found = [
        GPTQ(block_size=size).apply(matrix, Form(4, 32, True), "w", statistics).values()
        for size in (1, 7, 1000)
    ]
    for other in found[1:]:
        assert np.isclose(found[0], other, atol=1e-4).mean() > 0.95
        assert loss(other, matrix, statistics.gram) == pytest.approx(
            loss(found[0], matrix, statistics.gram), rel=0.02
        )


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_are_worked_on_in_parts_come_out_the_same(
    symmetric: bool, correlated: Correlated, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, statistics = weight(20, 40), correlated(40)
    form, step = Form(4, 16, symmetric), GPTQ()
    whole = step.apply(matrix, form, "w", statistics)
    monkeypatch.setattr(gptq, "_AT_ONCE", 7 * 40)
    parts = step.apply(matrix, form, "w", statistics)
    assert parts.grid == whole.grid
    # Products of fewer rows may be added up in another order.
    np.testing.assert_allclose(parts.scales, whole.scales, rtol=1e-4)
    assert (unpack(parts.codes, parts.grid) == unpack(whole.codes, whole.grid)).mean() > 0.99


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_an_input_that_is_always_zero_become_zero(symmetric: bool, correlated: Correlated) -> None:
    gram = correlated(40).gram.copy()
    gram[5] = gram[:, 5] = 0
    row = np.ones(40, np.float32)
    matrix = weight(10, 40)
    matrix[:, 5] = 50
    values = GPTQ().apply(matrix, Form(4, 16, symmetric), "w", Statistics(gram, row, row, 10)).values()
    assert (values[:, 5] == 0).all()
    others = np.arange(40) != 5
    assert np.abs(values - matrix)[:, others].max() < 1.5
    dead = Statistics(np.zeros_like(gram), row, row, 10)
    assert (GPTQ().apply(matrix, Form(4, 16, symmetric), "w", dead).values() == 0).all()


def test_a_singular_hessian_is_damped_and_it_is_said(correlated: Correlated) -> None:
    matrix, statistics = weight(10, 64), correlated(64, tokens=8)
    with pytest.warns(DampedWarning, match="singular"):
        found = GPTQ(**{**PAPER, "damping": 0}).apply(matrix, Form(4, 32, True), "w", statistics)
    plain = quantize(matrix, 4, 32)
    assert loss(found.values(), matrix, statistics.gram) < loss(plain.values(), matrix, statistics.gram)


def test_shrinking_helps_on_other_texts() -> None:
    random = np.random.default_rng(0)
    mixing = random.standard_normal((96, 96)) * np.exp(0.5 * random.standard_normal(96))

    def statistics(tokens: int) -> Statistics:
        return Statistics.of((random.standard_normal((tokens, 96)) @ mixing).astype(np.float32))

    few, others, matrix, form = statistics(60), statistics(4000), weight(64, 96), Form(3, 32, True)
    paper = GPTQ(damping=0.01, shrinkage=0).apply(matrix, form, "w", few).values()
    ours = GPTQ().apply(matrix, form, "w", few).values()
    assert loss(ours, matrix, others.gram) < 0.9 * loss(paper, matrix, others.gram)


def test_without_statistics_it_rounds_to_the_nearest_code() -> None:
    matrix = weight(10, 50)
    found = GPTQ().apply(matrix, Form(8, 32, True), "embedding", None)
    assert np.array_equal(found.codes, quantize(matrix, 8, 32).codes)


def test_the_result_is_one_and_the_same_and_fills_up_with_zeros(correlated: Correlated) -> None:
    matrix, statistics = weight(10, 50), correlated(50)
    before = matrix.copy(), statistics.gram.copy()
    first, second = (GPTQ().apply(matrix, Form(3, 32, False), "w", statistics) for _ in range(2))
    assert all(np.array_equal(first.arrays()[name], second.arrays()[name]) for name in first.arrays())
    assert first.grid == Grid(10, 50, 3, 32, "integer")
    assert first.zero_points is not None
    filling = unpack(first.codes, first.grid)[:, 1, 18:]
    assert (filling == first.zero_points[:, 1:]).all()
    assert np.array_equal(matrix, before[0])
    assert np.array_equal(statistics.gram, before[1])


def test_damage_and_foreign_statistics_are_refused(correlated: Correlated) -> None:
    matrix = weight(4, 32)
    with pytest.raises(ShapeError, match=r"layers\.0 has 32 inputs"):
        GPTQ().apply(matrix, Form(4, 32, True), "layers.0", correlated(33))
    matrix[1, 1] = np.nan
    with pytest.raises(InputError, match=r"layers\.0 holds NaN"):
        GPTQ().apply(matrix, Form(4, 32, True), "layers.0", correlated(32))


@pytest.mark.parametrize(
    "fields",
    [{"damping": -0.1}, {"shrinkage": 2}, {"block_size": 0}, {"refine": -1}, {"refine": 1.5}, {"bits": 1}],
)
def test_impossible_steps_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UnsupportedOptionError):
        GPTQ(**fields)  # type: ignore[arg-type]


def test_the_step_is_plain_data() -> None:
    step = GPTQ(bits=3, damping=0.05, overrides={"a*": None})
    told = json.loads(json.dumps(step.to_dict()))
    assert told.pop("step") == "gptq"
    assert GPTQ(**told) == step
    assert GPTQ.needs_texts
