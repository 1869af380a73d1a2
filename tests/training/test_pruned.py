"""Zeros stay zero while everything else learns."""

import numpy as np
import pytest
import torch

from lmopt import Compressor, Model
from lmopt.backends.torch.quantizing import find_weights, matrix_of
from lmopt.compression import Magnitude
from lmopt.testing.models import VOCAB_SIZE, tiny_gpt, tiny_llama
from lmopt.training import NextToken, TrainingConfig, train
from lmopt.training.pruned import keeping_zeros
from lmopt.training.recovering import recover
from lmopt.training.steps import Distill

DATA = [np.random.default_rng(0).integers(0, VOCAB_SIZE, 2000)]


def zeros(model: Model) -> dict[str, torch.Tensor]:
    paths = [one.path for one in find_weights(model.module, VOCAB_SIZE) if one.part == "linear"]
    return {path: matrix_of(model.module.get_submodule(path)).detach() == 0 for path in paths}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt])
def test_zeros_stay_and_all_else_moves(make: object) -> None:
    model = Model.from_module(make())  # type: ignore[operator]
    small = Compressor([Magnitude(sparsity=0.5)]).compress(model)
    before = zeros(small)
    step = Distill(max_steps=5, learning_rate=1e-2, block_size=16, training={"weight_decay": 0.1})
    after = zeros(recover(small, model, step, data=DATA).model)
    for path, mask in before.items():
        assert 0.4 < float(mask.float().mean()) < 0.6
        assert torch.equal(after[path], mask), path
    # It is no accident of the optimiser's.
    free = Distill(max_steps=5, learning_rate=1e-2, block_size=16, keep_zeros=False)
    assert not any(mask.any() for mask in zeros(recover(small, model, free, data=DATA).model).values())


def test_it_says_where_zeros_are_and_takes_its_hooks_off() -> None:
    module = tiny_llama().requires_grad_(True)
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[:16] = 0  # type: ignore[index,union-attr]
        module.lm_head.weight[:3] = 0  # type: ignore[index,union-attr]
    with keeping_zeros(module, VOCAB_SIZE) as found:
        assert found == {"model.layers.0.mlp.up_proj": pytest.approx(0.25)}
    model = Model.from_module(module)
    train(
        model, DATA, config=TrainingConfig(max_steps=1, block_size=16, learning_rate=1e-2), loss=NextToken()
    )
    assert not (model.module.model.layers[0].mlp.up_proj.weight == 0).any()  # type: ignore[index,union-attr]
