"""The oracle gives logits piece by piece as it gives them whole."""

import numpy as np
import pytest
import torch

from lmopt.backends.torch.compressing import by_matrix
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.reference import FullForward
from lmopt.compression import Quantize
from lmopt.compression.step import Setting
from lmopt.errors import EngineError
from lmopt.testing.models import tiny_gpt, tiny_llama

IDS = np.random.default_rng(0).integers(0, 90, 50)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt])
@pytest.mark.parametrize("size", [7, 25, 64])
def test_pieces_are_the_whole(build, size: int) -> None:
    module = build()
    reference = FullForward(module, lean=True)
    pieces = list(reference.pieces(IDS, size))
    assert [len(one) for one in pieces] == [len(IDS[start : start + size]) for start in range(0, 50, size)]
    np.testing.assert_allclose(np.concatenate(pieces), reference(IDS), rtol=1e-5, atol=1e-5)


def test_the_blocks_run_once_and_the_model_stays_as_it_was() -> None:
    module = tiny_llama()
    runs: list[int] = []
    module.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    heads: list[int] = []
    module.lm_head.register_forward_hook(lambda part, args, result: heads.append(result.shape[1]))
    assert len(list(FullForward(module).pieces(IDS, 16))) == 4
    assert len(runs) == 1
    assert heads == [16, 16, 16, 2]
    assert "forward" not in vars(module.model)


def test_lean_pieces_leave_no_float_weights_behind() -> None:
    module = by_matrix(tiny_llama(), Quantize(4, 32), Setting(97))
    list(FullForward(module, lean=True).pieces(IDS, 16))
    assert all(part._dense._made is None for part in quantized_parts(module).values())


def test_a_failure_is_told() -> None:
    with pytest.raises(EngineError, match="fails on a row of 3 tokens"):
        list(FullForward(tiny_llama()).pieces(np.array([1, 2, 10**6]), 2))
    with torch.no_grad(), pytest.raises(EngineError):
        FullForward(tiny_llama())(np.array([10**6]))
