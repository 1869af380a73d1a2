"""transformers loads every checkpoint that lmopt writes, and computes what lmopt computes."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmopt
from lmopt.compression import GPTQ, DropBlocks, Magnitude, PruneChannels, PruneHeads
from lmopt.compression.calibration import Calibration
from lmopt.training import Distill

TEXT = "the old house by the sea and the cat sat on the mat while a dog ran to the door. " * 12
STEPS: dict[str, Callable[[], list[Any]]] = {
    "float": list,
    "sparse": lambda: [Magnitude(sparsity=0.5)],
    "fewer blocks": lambda: [DropBlocks(share=0.5)],
    "fewer channels": lambda: [PruneChannels(share=0.25)],
    "fewer heads": lambda: [PruneHeads(share=0.5)],
    "distilled": lambda: [
        DropBlocks(share=0.5),
        Distill(max_steps=2, teacher_rows=0, block_size=32, batch_size=2),
    ],
    "compressed-tensors": lambda: [GPTQ(bits=4, group_size=32, embedding=None, head=None)],
}


@pytest.mark.parametrize("kind", STEPS)
def test_it_loads_and_computes_the_same(kind: str, tiny: Path, tmp_path: Path) -> None:
    model = lmopt.Model.from_pretrained(tiny, dtype="float32")
    if steps := STEPS[kind]():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a random model loses much is no surprise
            model = lmopt.Compressor(steps).compress(
                model, calibration=Calibration([TEXT], rows=4, row_tokens=48)
            )
    options = {"quantization_format": "compressed-tensors"} if kind == "compressed-tensors" else {}
    model.save_pretrained(tmp_path / "saved", **options)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ids = tokenizer.encode("the cat ran to the sea")
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
        written = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[
            0, len(ids) :
        ].tolist()
    with lmopt.Runtime(model, backend="torch") as runtime:
        assert runtime.tokenizer is not None
        assert runtime.tokenizer.encode("the cat ran to the sea") == ids
        np.testing.assert_allclose(runtime.logits(ids), expected, atol=2e-4)
        assert list(runtime.generate(ids, max_new_tokens=8, do_sample=False).token_ids) == written
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.inference_mode():
        same = np.allclose(plain(torch.tensor([ids])).logits[0].numpy(), expected, atol=1e-3)
    assert same == (kind == "float"), "a step must have changed the model"
