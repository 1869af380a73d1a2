"""What tests of translations into ONNX share: seeing what is said on the way, and running what comes out."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from torch import Tensor


def listen(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[bool]:
    """Give the list to which a module's function adds what it says from now on."""
    said: list[bool] = []
    real = getattr(module, name)

    def heard(*given: Any) -> bool:
        said.append(real(*given))
        return said[-1]

    monkeypatch.setattr(module, name, heard)
    return said


def run(model: ir.Model, arguments: tuple[Tensor, ...]) -> list[np.ndarray]:
    """Compute a graph of as many inputs as there are arguments."""
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, {name: one.numpy() for name, one in zip(names, arguments, strict=True)})
