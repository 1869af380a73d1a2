"""What can be held on a CPU of what is for GPUs; the rest is in tests/test_on_gpu.py."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

from lmopt import Exporter, Model
from lmopt.backends.torch.export_program import read_program
from lmopt.testing.models import VOCAB_SIZE, tiny_llama


def test_a_choice_about_tf32_leaves_a_process_that_can_still_export() -> None:
    """torch refuses to answer its older switches where they and the newer ones disagree, and its tracer asks them."""
    code = """
        import torch
        from lmopt.backends.torch.engine import _set_precision
        from lmopt.backends.torch.language_model import as_decoder
        from lmopt.backends.torch.tracing import export_program
        from lmopt.testing.models import tiny_llama
        # As a user may have left it: the newer switches say so already, and the older ones do not.
        for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            part.fp32_precision = "ieee"
        for allowed in (False, True, False):
            _set_precision(allow_tf32=allowed)
            cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
            assert cudnn.allow_tf32 is products.allow_tf32 is allowed
            wanted = "tf32" if allowed else "ieee"
            assert {products.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision} == {wanted}
            export_program(as_decoder(tiny_llama()), may_fix=False)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_program_moves_to_another_device(tmp_path: Path) -> None:
    artifact = Exporter("torch.export").export(Model.from_module(tiny_llama()), tmp_path / "out")
    program = read_program(artifact, VOCAB_SIZE, torch.device("meta"), trust=True)
    ids, mask = torch.zeros((2, 3), dtype=torch.int64), torch.ones((2, 3), dtype=torch.int64)
    positions = torch.arange(3).expand(2, 3)
    given = [one.to("meta") for one in (ids, mask, positions)]
    logits, state = program(*given, program.zero_state(2, torch.device("meta")))
    assert logits.device.type == "meta"
    assert logits.shape == (2, 3, VOCAB_SIZE)
    assert {one.device.type for one in state} == {"meta"}
    here = read_program(artifact, VOCAB_SIZE, torch.device("cpu"), trust=True)
    logits, _ = here(ids, mask, positions, here.zero_state(2, torch.device("cpu")))
    assert np.isfinite(logits.detach().numpy()).all()
