"""The tiny models: the same on every machine, and hard to be right about by luck."""

import sys

import numpy as np
import pytest

from lmopt.errors import NotInstalledError
from lmopt.testing.models import VOCAB_SIZE
from lmopt.testing.workshop import MODELS, reference_of

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_the_weights_and_leaves_torchs_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    one, two = MODELS[name](), MODELS[name]()
    other = MODELS[name](seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for (path, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), path
        assert not torch.equal(a, c), path
    assert not one.training


@pytest.mark.parametrize("name", MODELS)
def test_every_earlier_token_tells(name: str) -> None:
    reference = reference_of(MODELS[name]())
    row = np.random.default_rng(0).integers(0, VOCAB_SIZE, 20)
    logits = reference(row)
    assert logits.shape == (20, VOCAB_SIZE)
    assert logits.dtype == np.float32
    assert 0.3 < logits.std() < 3
    for changed in (0, 10, 18):
        other = row.copy()
        other[changed] = (other[changed] + 1) % VOCAB_SIZE
        difference = np.abs(reference(other) - logits).max(axis=1)
        assert (difference[:changed] == 0).all()
        # A hundred times what the float32 tolerance forgives.
        assert difference[-1] > 0.01, changed


@pytest.mark.parametrize("name", MODELS)
def test_the_models_keep_the_tolerance_of_half_types_on_the_reference_engine(name: str) -> None:
    from lmopt.evaluation.divergence import compare_logits
    from lmopt.evaluation.tolerances import tolerance_for

    rows = [np.random.default_rng(seed).integers(0, VOCAB_SIZE, 24) for seed in range(4)]
    for dtype in ("float16", "bfloat16"):
        module = MODELS[name]().to(getattr(torch, dtype))
        half, full = reference_of(module), reference_of(MODELS[name]().to(getattr(torch, dtype)).float())
        worst = max(compare_logits(full(row), half(row), tolerance_for(dtype)).kl_max for row in rows)
        assert worst < tolerance_for(dtype).kl_mean, dtype


def test_a_missing_torch_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(NotInstalledError, match=r'-m pip install "lmopt\[torch,onnx\]"'):
            MODELS["llama"]()
