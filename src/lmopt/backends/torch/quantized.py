"""Linears and embeddings whose weight is stored quantized, in `lmopt.compression.layout`.

In eager mode they compute with the dequantized weight, which they keep after the first call: the speed,
and the memory, of a float model. What they save is on disk, and on engines with kernels for them: when
they are traced for a graph, they leave as that engine's operators.
"""

from collections.abc import Callable
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from lmopt.backends.torch.lowering import dialect
from lmopt.backends.torch.rounded import block_of, multiply, rounded
from lmopt.compression.layout import Grid, QuantizedArray
from lmopt.errors import ShapeError

STORED: Final = ("codes", "scales", "zero_points", "offsets")

# Codes unpacked at once where their width has no quick way: eight times that many bytes.
_CHUNK: Final = 1 << 22


class Quantized(nn.Module):
    """A weight of `rows x columns` in groups; see `lmopt.compression.layout`.

    Args:
        array: The weight.

    Attributes:
        grid: Its form.
        codes, scales, zero_points, offsets: The stored arrays, as buffers; `None` where its form has none.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    offsets: Tensor | None

    def __init__(self, array: QuantizedArray) -> None:
        super().__init__()
        self.grid = array.grid
        for name in STORED:
            stored = getattr(array, name)
            self.register_buffer(
                name, None if stored is None else torch.from_numpy(np.ascontiguousarray(stored))
            )
        self._dense = _Kept(dequantize)
        self._centred = _Kept(centred)
        # Set by `lmopt.backends.torch.quantized_lowering` for the time of a trace.
        self._lowered: Any = None
        # The weights are no parameters: nothing trains whole numbers.
        self.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, `(rows, columns)` float32, computed once and kept."""
        return self._dense.of(self)

    @property
    def weight_count(self) -> int:
        """Number of weights that the codes stand for."""
        return self.grid.rows * self.grid.columns

    def forget(self) -> None:
        """Let go of the dequantized weight, until it is asked for again."""
        self._dense.clear()
        self._centred.clear()

    def array(self) -> QuantizedArray:
        """The stored weight in NumPy, on the CPU."""
        stored = {name: getattr(self, name) for name in STORED}
        return QuantizedArray(
            self.grid, **{name: one.cpu().numpy() for name, one in stored.items() if one is not None}
        )

    def share(self, other: "Quantized") -> Self:
        """Hold the very weight of another part (tied embeddings).

        Raises:
            ShapeError: It has another form.
        """
        if self.grid != other.grid:
            raise ShapeError(f"a weight of the form {self.grid} cannot be that of {other.grid}")
        for name in STORED:
            setattr(self, name, getattr(other, name))
        self._dense, self._centred = other._dense, other._centred
        return self

    def extra_repr(self) -> str:
        """Say what it holds when printed."""
        grid = self.grid
        return f"{grid.rows} x {grid.columns}, {grid.bits} bits, groups of {grid.group_size}, {grid.zero}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # A weight in 16 bits would be another grid: buffers move, but keep their type.
        def moved(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            if result.dtype == tensor.dtype or not tensor.is_floating_point():
                return result
            return tensor.to(result.device)

        for name in STORED:
            stored = self._buffers.get(name)
            if stored is not None:
                self._buffers[name] = moved(stored)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(fn(parameter.data), requires_grad=False)
        return self


class QuantizedLinear(Quantized):
    """`x @ weight.T + bias` with a quantized weight of `out_features x in_features`.

    Args:
        array: The weight.
        bias: `(out_features,)`, kept in float.
        activations: 8 rounds what it reads to 8 bits, see `lmopt.backends.torch.rounded`; `None` does not.
    """

    bias: Tensor | None

    def __init__(
        self, array: QuantizedArray, bias: Tensor | None = None, *, activations: int | None = None
    ) -> None:
        super().__init__(array)
        self.activations = activations
        self.in_features, self.out_features = array.grid.columns, array.grid.rows
        kept = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", kept)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `(..., in_features)`."""
        if torch.compiler.is_exporting():
            if dialect() == "onnxruntime" and self._lowered is not None:
                product: Tensor = self._lowered.emit(x, self.bias)
                return product
            if self.activations is not None:
                # `ai.onnx` has no product like it, so its values are made and multiplied in float.
                x = rounded(x, block_of(self.grid))
            weight = emit_dequantize(self) if dialect() == "portable" else self.weight
            return functional.linear(x, weight.to(x.dtype), self.bias)
        if self.activations is not None:
            made = multiply(x, self.grid, self._centred.of(self), self.scales, self.offsets)
            return made if self.bias is None else made + self.bias
        return functional.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Say what it holds when printed."""
        read = "" if self.activations is None else f", activations in {self.activations} bits"
        return super().extra_repr() + read


class QuantizedEmbedding(Quantized):
    """Rows of a quantized weight of `num_embeddings x embedding_dim`.

    Args:
        array: The weight.
        dtype: Type of the result.
        padding_idx: As for `torch.nn.Embedding`; it changes nothing in inference.
        factor: What rows are multiplied by, as Gemma and BART do: a tensor is rounded to the result's type first.
    """

    def __init__(
        self,
        array: QuantizedArray,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
        factor: float | Tensor = 1.0,
    ) -> None:
        super().__init__(array)
        self._given = factor
        self.num_embeddings, self.embedding_dim = array.grid.rows, array.grid.columns
        self.padding_idx = padding_idx
        self._compute_in(dtype)

    def _compute_in(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        given = self._given
        self._factor = given.to(dtype).item() if isinstance(given, Tensor) else given

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._compute_in(fn(torch.zeros((), dtype=self.dtype, device=self.codes.device)).dtype)
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up `(...)` ids; give `(..., embedding_dim)`."""
        rows = self._rows(ids).to(self.dtype)
        return rows if self._factor == 1.0 else rows * self._factor

    def _rows(self, ids: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            if dialect() == "onnxruntime" and self._lowered is not None:
                found: Tensor = self._lowered.gather(ids, self.grid)
                return found
            weight = emit_dequantize(self) if dialect() == "portable" else self.weight
            return functional.embedding(ids, weight)
        # A text reads a few rows of many.
        return dequantize(self, ids.flatten()).reshape(*ids.shape, self.embedding_dim)


class _Kept:
    """What was made of a part's buffers, and of which; parts with one weight share it."""

    def __init__(self, make: "Callable[[Quantized], Tensor]") -> None:
        self._make = make
        self._made_of: tuple[Any, ...] = ()
        self._made: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Kept":
        # What it holds follows from the buffers, which it compares before use.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Kept, (self._make,)

    def clear(self) -> None:
        self._made_of, self._made = (), None

    def of(self, part: Quantized) -> Tensor:
        stored = [getattr(part, name) for name in STORED]
        if any(isinstance(one, FakeTensor) for one in stored):
            # A trace; T5 asks a linear for the type of its weight there.
            return self._make(part)
        made_of = tuple((one.data_ptr(), one._version, one.device) for one in stored if one is not None)
        if self._made is None or self._made_of != made_of:
            self._made, self._made_of = self._make(part), made_of
        return self._made


def dequantize(part: Quantized, rows: Tensor | slice = slice(None)) -> Tensor:
    """Compute a part's weight by the rule of the layout, bit by bit.

    Args:
        part: The part.
        rows: Which rows: a slice, or `(n,)` int64 row numbers.

    Returns:
        `(rows, columns)` float32.
    """
    grid = part.grid
    result = _groups(part, rows).mul_(_taken(part.scales, rows)[..., None])
    if part.offsets is not None:
        result.add_(_taken(part.offsets, rows)[..., None])
    return result.flatten(1)[:, : grid.columns].contiguous()


def centred(part: Quantized) -> Tensor:
    """Give a part's codes, its zeros taken off: `(rows, groups, group_size)` float32 whole numbers."""
    return _groups(part, slice(None))


def _groups(part: Quantized, rows: Tensor | slice) -> Tensor:
    """Unpack codes and take whole zeros off: `(rows, groups, group_size)` float32."""
    grid, stored = part.grid, _taken(part.codes, rows)
    result = torch.empty(len(stored), grid.groups, grid.group_size, device=stored.device)
    step = max(1, _CHUNK // (grid.groups * grid.group_size))
    for start in range(0, len(stored), step):
        result[start : start + step] = _unpack(stored[start : start + step], grid)
    if part.zero_points is not None:
        result.sub_(_taken(part.zero_points, rows)[..., None])
    elif part.offsets is None:
        result.sub_(grid.midpoint)
    return result


def _taken(stored: Tensor, rows: Tensor | slice) -> Tensor:
    # Unlike an index in brackets, this refuses negative rows.
    return stored[rows] if isinstance(rows, slice) else stored.index_select(0, rows)


def _unpack(codes: Tensor, grid: Grid) -> Tensor:
    if grid.bits == 8:
        return codes
    if grid.bits == 4:
        return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = (codes[..., None] >> places) & 1
    values = bits.reshape(*codes.shape[:2], grid.group_size, grid.bits) << places[: grid.bits]
    return values.sum(-1, dtype=torch.uint8)


def quantized_parts(module: nn.Module) -> dict[str, Quantized]:
    """List a module's quantized parts by path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Quantized)}


def rounded_bits(module: nn.Module) -> int | None:
    """Bits to which some linear of a module rounds what it reads, `None` where none does."""
    found = (getattr(part, "activations", None) for part in quantized_parts(module).values())
    return min((bits for bits in found if bits is not None), default=None)


def emit_dequantize(part: Quantized) -> Tensor:
    """Write a weight into a graph of the portable dialect: codes, scales and zeros, dequantized there.

    Returns:
        `(rows, columns)` float32, as far as torch can see. `finish_portable` turns what is written
        into `DequantizeLinear` with 4-bit or 8-bit codes.
    """
    grid = part.grid
    inputs = [part.codes, part.scales, part.zero_points, part.offsets]
    result: Tensor = torch.onnx.ops.symbolic(
        "lmopt::Dequantize",
        inputs,
        {"bits": grid.bits, "group_size": grid.group_size, "rows": grid.rows, "columns": grid.columns,
         "zero": grid.zero},
        dtype=torch.float32,
        shape=[grid.rows, grid.columns],
        version=1,
    )  # fmt: skip
    return result
