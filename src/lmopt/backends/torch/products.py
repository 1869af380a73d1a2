"""Multiply in 8 bits: weights and what they are multiplied with as `QuantizeLinear` and `DequantizeLinear`.

This is the form in which the standard says so, and from which TensorRT takes its int8 and fp8 kernels: weights with a
scale a column, activations with one scale that is measured beforehand, both around zero. `int8` has 255 equal steps
(Jacob et al. 2017, arXiv:1712.05877); `fp8` is E4M3, which is finer near zero and holds outliers better (Micikevicius
et al. 2022, arXiv:2209.05433). The product that makes the logits stays as it is.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmopt.backends.torch.language_model import Decoder, device_of
from lmopt.errors import UnsupportedError
from lmopt.signature import LOGITS
from lmopt.types import FloatArray, IntArray

PRODUCTS: Final = ("auto", "int8", "fp8")
_KINDS: Final[dict[str, tuple[Any, float]]] = {
    "int8": (np.int8, 127.0),
    "fp8": (ml_dtypes.float8_e4m3fn, 448.0),
}
_RANDOM_TOKENS: Final = 256
# The least scale that half precision holds with all its digits.
_LEAST: Final = 2.0**-14


def ranges_of(decoder: Decoder, rows: Sequence[IntArray], context: int | None) -> dict[bytes, float]:
    """Show a model some texts and see how large that is which its linears read.

    Args:
        decoder: The model.
        rows: `(tokens,)` ids each; a row of seeded random ids is added, since texts that go astray look so.
        context: Most tokens of a row.

    Returns:
        The largest magnitude, by the weight that it is multiplied with (see `_digest`).
    """
    vocabulary, device = decoder.signature.vocab_size, device_of(decoder)
    random = np.random.default_rng(0).integers(0, vocabulary, _RANDOM_TOKENS)
    with torch.inference_mode(), _Watch() as watch:
        for row in (*rows, random):
            decoder.start(torch.from_numpy(np.asarray(row[:context], np.int64))[None].to(device))
    # Now and not while watching: a weight of 100 MB is looked at once.
    return {_digest(weight.t().cpu()): most for weight, most in watch.found.values()}


def quantize_products(model: ir.Model, kind: str, ranges: dict[bytes, float]) -> int:
    """Let the linears of a finished graph multiply in 8 bits.

    Args:
        model: The graph; it is changed.
        kind: `"int8"` or `"fp8"`.
        ranges: From `ranges_of`.

    Returns:
        How many were changed.

    Raises:
        UnsupportedError: There is none.
    """
    graph = model.graph
    count = 0
    rounded: dict[tuple[int, float], ir.Value] = {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        stored = None if weight is None else weight.const_value
        if weight is None or stored is None or len(stored.shape) != 2 or _makes_logits(node):
            continue
        values = stored.numpy()
        most = ranges.get(
            _digest(torch.from_numpy(values.view(np.int16) if values.itemsize == 2 else values))
        )
        read = node.inputs[0]
        if most is None or read is None:
            continue
        write = _Writer(graph, node, kind, values.dtype)
        if (id(read), most) not in rounded:
            rounded[id(read), most] = write.activations(read, most)
        node.replace_input_with(0, rounded[id(read), most])
        node.replace_input_with(1, write.weight(weight, values.astype(np.float32)))
        if not weight.uses() and weight.name in graph.initializers:
            del graph.initializers[weight.name]
        count += 1
    if not count:
        raise UnsupportedError(
            f"products={kind!r} found no linear with weights in float: those of a compressed model keep their own "
            "form. Export the original model with it"
        )
    return count


class _Watch(TorchFunctionMode):
    """Notes what every linear is given, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[Tensor, float]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands of `linear`, and call it."""
        if func is torch.nn.functional.linear and len(args) > 1:
            most = float(args[0].abs().amax())
            weight, before = self.found.get(args[1].data_ptr(), (args[1], 0.0))
            self.found[args[1].data_ptr()] = weight, max(most, before)
        return func(*args, **(kwargs or {}))


class _Writer:
    """Writes the nodes around one product."""

    def __init__(self, graph: ir.Graph, node: ir.Node, kind: str, dtype: Any) -> None:
        self._graph, self._node = graph, node
        self._type, self._most = _KINDS[kind]
        self._dtype = dtype

    def activations(self, read: ir.Value, most: float) -> ir.Value:
        name = f"{self._node.name}.input"
        scale = self._constant(f"{name}.scale", self._scale(np.float32(most)))
        zero = self._constant(f"{name}.zero", np.zeros((), self._type))
        codes = self._apply("QuantizeLinear", name, [read, scale, zero], read)
        return self._apply("DequantizeLinear", name, [codes, scale, zero], read)

    def weight(self, weight: ir.Value, values: FloatArray) -> ir.Value:
        scales = self._scale(np.abs(values).max(0))
        steps = values / scales.astype(np.float32)
        steps = np.rint(steps) if self._type is np.int8 else steps
        codes = np.clip(steps, -self._most, self._most).astype(self._type)
        operands = [
            self._constant(f"{weight.name}.quantized", codes),
            self._constant(f"{weight.name}.scale", scales),
        ]
        return self._apply("DequantizeLinear", f"{self._node.name}.weight", operands, weight, axis=1)

    def _scale(self, most: Any) -> Any:
        return np.maximum(most / np.float32(self._most), np.float32(_LEAST)).astype(self._dtype)

    def _constant(self, name: str, values: Any) -> ir.Value:
        made = ir.Value(name=name)
        made.const_value = ir.tensor(np.asarray(values), name=name)
        made.shape, made.type = made.const_value.shape, ir.TensorType(made.const_value.dtype)
        self._graph.register_initializer(made)
        return made

    def _apply(
        self, operator: str, name: str, operands: list[ir.Value], like: ir.Value, **attributes: int
    ) -> ir.Value:
        node = ir.node(operator, operands, attributes=attributes or None)
        node.name = f"{name}.{operator.lower()}"
        self._graph.insert_before(self._node, node)
        made = node.outputs[0]
        made.name, made.shape = f"{node.name}.out", like.shape
        kind = ir.DataType.from_numpy(np.dtype(self._type)) if operator == "QuantizeLinear" else like.dtype
        made.type = None if kind is None else ir.TensorType(kind)
        return made


def _makes_logits(node: ir.Node) -> bool:
    """Whether what a product makes is the logits, but for a bias or a cast."""
    value = node.outputs[0]
    while value.name != LOGITS:
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type not in {"Add", "Cast", "Mul", "Div", "Tanh", "Reshape"}:
            return False
        value = uses[0].node.outputs[0]
    return True


def _digest(weight: Tensor) -> bytes:
    """Tell weights apart by their bytes: a trace gives them other names, and turns them round."""
    found = weight.contiguous()
    raw = found.view(torch.int16) if found.element_size() == 2 else found
    return hashlib.sha256(raw.numpy().tobytes()).digest() + repr(tuple(found.shape)).encode()
