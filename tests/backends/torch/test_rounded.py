"""Activations in 8 bits: what they are, that rows are strangers, and that ONNX Runtime computes the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lmopt
from lmopt.backends.torch.compressing import by_matrix
from lmopt.backends.torch.quantized import QuantizedLinear, quantized_parts
from lmopt.backends.torch.rounded import block_of, round_rows, rounded
from lmopt.compression import Quantize, SmoothQuant
from lmopt.compression.layout import Grid, QuantizedArray, quantize
from lmopt.compression.step import Setting
from lmopt.errors import UnsupportedOptionError
from lmopt.testing.models import tiny_llama


def linear(rows: int, columns: int, size: int, *, symmetric: bool = True, seed: int = 0) -> QuantizedLinear:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    return QuantizedLinear(quantize(matrix, 8, size, symmetric=symmetric), activations=8)


def activations(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "block"), [(32, 32), (512, 256), (96, 32), (16, 16), (12, 12), (40, 40)])
def test_a_block_is_one_of_the_operators_or_the_group(size: int, block: int) -> None:
    assert block_of(Grid(4, 2 * size, 8, size)) == block


def test_rounding_is_to_the_nearest_of_255_values_a_block() -> None:
    x = activations(5, 100)
    x[2, :32] = 0
    codes, scales = round_rows(x, 32)
    assert codes.shape == (5, 4, 32)
    assert scales.shape == (5, 4, 1)
    assert codes.abs().max() == 127
    assert (codes == codes.round()).all()
    assert (codes[2, 0] == 0).all()
    error = (rounded(x, 32) - x).abs()
    assert (error <= (scales / 2 * 1.0001).repeat_interleave(32, 1)[:, :100, 0]).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("size", "columns", "symmetric"), [(32, 96, True), (64, 100, False), (512, 512, True), (12, 36, True)]
)
def test_a_product_is_that_of_the_rounded_values(size: int, columns: int, symmetric: bool) -> None:
    part = linear(24, columns, size, symmetric=symmetric)
    x = activations(7, columns)
    expected = rounded(x, block_of(part.grid)).double() @ part.weight.double().t()
    torch.testing.assert_close(part(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(part(x).double(), x.double() @ part.weight.double().t(), rtol=1e-5, atol=1e-5)


def test_float_offsets_are_added() -> None:
    base = quantize(np.random.default_rng(0).standard_normal((8, 64), np.float32), 8, 32, symmetric=False)
    assert base.zero_points is not None
    offsets = np.random.default_rng(1).standard_normal(base.scales.shape).astype(np.float32)
    array = QuantizedArray(Grid(8, 64, 8, 32, "offset"), base.codes, base.scales, offsets=offsets)
    part, x = QuantizedLinear(array, activations=8), activations(3, 64)
    expected = rounded(x, 32).double() @ part.weight.double().t()
    torch.testing.assert_close(part(x).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    part, x = linear(130, 200, 64), activations(67, 200).to(dtype)
    # Neighbours of another size, which a scale of the whole tensor would feel.
    x[::3] *= 1000
    whole = part(x)
    for place in (0, 1, 33, 66):
        assert torch.equal(part(x[place : place + 1])[0], whole[place])
    assert torch.equal(part(x.reshape(1, 67, 200))[0], whole)
    assert whole.dtype == dtype


def rounding_model(step: Quantize) -> lmopt.Model:
    model = lmopt.Model.from_module(tiny_llama())
    rows = [np.random.default_rng(n).integers(0, model.facts.vocab_size, 32) for n in range(4)]
    return model.with_module(by_matrix(model.module, step, Setting(model.facts.vocab_size, rows)))


def test_a_step_declares_it_and_exceptions_may_differ() -> None:
    step = Quantize(8, 32, activations=8, overrides={"*.down_proj": {"activations": None}})
    parts = quantized_parts(rounding_model(step).module)
    found = {path: getattr(part, "activations", None) for path, part in parts.items()}
    assert {bits for path, bits in found.items() if path.endswith("down_proj")} == {None}
    assert {bits for path, bits in found.items() if path.endswith("q_proj")} == {8}
    with pytest.raises(UnsupportedOptionError, match="activations is 4"):
        Quantize(8, activations=4)
    with pytest.raises(UnsupportedOptionError, match="activations is True"):
        Quantize(8, overrides={"*": {"activations": True}})
    assert SmoothQuant().activations == 8


def test_the_choice_survives_saving_and_is_part_of_the_identity(tmp_path: Path) -> None:
    small = rounding_model(SmoothQuant(8, 32))
    small.save_pretrained(tmp_path / "out")
    again = lmopt.Model.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        assert torch.equal(again.module(ids).logits, small.module(ids).logits)
    assert again.fingerprint() == small.fingerprint()
    for part in quantized_parts(again.module).values():
        if isinstance(part, QuantizedLinear):
            part.activations = None
    assert again.fingerprint() != small.fingerprint()


def test_what_others_cannot_compute_is_not_written_for_them(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="activations=None"):
        rounding_model(SmoothQuant(8, 32)).save_pretrained(
            tmp_path / "out", quantization_format="compressed-tensors"
        )


@pytest.mark.parametrize(
    ("step", "target"),
    [
        pytest.param(
            Quantize(bits, size, symmetric=bits == 8, activations=8),
            target,
            marks=marks,
            id=f"w{bits}-{target}",
        )
        for bits, size, target, marks in [
            (8, 32, "portable", ()),
            (8, 32, "onnxruntime", pytest.mark.sweep),
            (4, 48, "portable", pytest.mark.sweep),
            (4, 48, "onnxruntime", ()),
        ]
    ],
)
def test_onnx_runtime_computes_what_eager_does(step: Quantize, target: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx_ir")
    small = rounding_model(step)
    artifact = lmopt.Exporter("onnx", target=target).export(small, tmp_path / "out")
    assert artifact.manifest["formats"]["onnx"]["activations"] == 8
    assert artifact.manifest["formats"]["onnx"]["target"] == target
    assert artifact.manifest["parity"]["onnx"]["tolerance"]["name"] == "int8-activations"
    ids = np.random.default_rng(0).integers(0, small.facts.vocab_size, 40)
    with torch.inference_mode():
        eager = small.module(torch.from_numpy(ids)[None]).logits[0].numpy()
    with lmopt.Runtime(artifact, backend="onnxruntime") as runtime:
        # The same whole numbers: nearer than the table's row asks for, by orders of magnitude.
        np.testing.assert_allclose(np.asarray(runtime.logits(ids[None]))[0], eager, rtol=1e-4, atol=1e-4)
