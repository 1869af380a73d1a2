"""Compressor: what it makes, what it measures, and when it refuses."""

import warnings

import numpy as np
import pytest

import lmopt
from lmopt.compression import Quantize
from lmopt.compressor import Compressor, LossWarning, compare_models
from lmopt.errors import InputError, ParityError, UnsupportedOptionError
from lmopt.evaluation.tolerances import TOLERANCES, Tolerance
from lmopt.testing.models import tiny_llama

ANY = Tolerance("any", kl_mean=1e9, top1=0.0, perplexity_ratio=1e9)


@pytest.fixture(scope="module")
def model() -> lmopt.Model:
    return lmopt.Model.from_module(tiny_llama())


def test_fewer_bits_lose_more_and_the_report_says_so(model: lmopt.Model) -> None:
    before = model.fingerprint()
    eight, three = (
        Compressor([Quantize(bits, 32, embedding=bits, head=bits)], tolerance=ANY).compress(model)
        for bits in (8, 3)
    )
    assert model.fingerprint() == before
    assert eight.report is not None
    assert three.report is not None
    assert 0 < eight.report.difference.kl_mean < three.report.difference.kl_mean / 10
    assert three.report.bytes < eight.report.bytes < eight.report.float_bytes
    assert eight.recipe[0]["bits"] == 8
    assert "smaller" in str(eight.report)


def test_the_figures_are_those_of_the_logits(model: lmopt.Model) -> None:
    same = compare_models(model, model)
    assert same.difference.kl_mean == 0
    assert same.perplexity == same.float_perplexity
    assert same.difference.top1 == 1


def test_too_much_loss_is_refused_or_told(model: lmopt.Model) -> None:
    step = Quantize(2, 32, embedding=2, head=2)
    with pytest.raises(ParityError, match="mean KL") as caught:
        Compressor([step], tolerance=TOLERANCES["int8"]).compress(model)
    assert caught.value.report is not None
    with pytest.warns(LossWarning, match="loses too much"):
        Compressor([step]).compress(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Compressor([step], tolerance=ANY).compress(model)


def test_a_second_run_finds_nothing_left(model: lmopt.Model) -> None:
    small = Compressor([Quantize(8)], tolerance=ANY).compress(model)
    with pytest.raises(UnsupportedOptionError, match="quantized already"):
        Compressor([Quantize(8)], tolerance=ANY).compress(small)


def test_a_damaged_model_is_named() -> None:
    damaged = lmopt.Model.from_module(tiny_llama())
    damaged.module.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj"):
        Compressor([Quantize(8)]).compress(damaged)


@pytest.mark.parametrize("steps", [[], ["int4"], [np.zeros(1)]])
def test_recipes_hold_steps(steps: list[object]) -> None:
    with pytest.raises(UnsupportedOptionError, match="Quantize"):
        Compressor(steps)  # type: ignore[arg-type]


def test_texts_need_a_tokenizer(model: lmopt.Model) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        Compressor([Quantize(8)], tolerance=ANY).compress(model, texts=["a text"])
