"""Write quantized linears and embeddings into a graph for ONNX Runtime."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lmopt.backends.torch import matmulnbits
from lmopt.backends.torch.matmulnbits import Kernel
from lmopt.backends.torch.quantized import Quantized, QuantizedEmbedding, quantized_parts
from lmopt.compression.layout import Grid, QuantizedArray


class _Lowered(nn.Module):
    """What a part writes into a graph for ONNX Runtime; a module, so that a trace finds its tensors.

    Args:
        kernels: Products that are added.
        accuracy_level: Attribute of the operator.
        sums: The product that sums the activation over groups.
        repeats: How often its result is appended to the activation.
        offsets: `(groups, rows)` float32 that each sum is multiplied by, where digits cannot hold them; for
            a look-up `(rows, groups)`.
    """

    def __init__(
        self,
        kernels: list[Kernel],
        accuracy_level: int,
        sums: "_Product | None" = None,
        repeats: int = 0,
        offsets: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.products = [_Product(one) for one in kernels]
        self._registered = nn.ModuleList(self.products)
        self.accuracy_level = accuracy_level
        self.sums = sums
        self.repeats = repeats
        self.offsets: Tensor | None
        self.register_buffer("offsets", offsets, persistent=False)

    def emit(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Write `x @ weight.T + bias`."""
        sums = None if self.sums is None else self.sums.emit(x, self.accuracy_level)
        if sums is not None and self.repeats:
            x = torch.cat([x, *[sums] * self.repeats], dim=-1)
        result = self.products[0].emit(x, self.accuracy_level, bias)
        for product in self.products[1:]:
            result = result + product.emit(x, self.accuracy_level)
        if sums is not None and self.offsets is not None:
            result = result + sums @ self.offsets
        return result

    def gather(self, ids: Tensor, grid: Grid) -> Tensor:
        """Write a look-up of rows."""
        (table,) = self.products
        zeros = table.zero_points
        inputs = [table.codes.flatten(1), ids, table.scales] + ([] if zeros is None else [zeros])
        attributes: dict[str, Any] = {
            "bits": table.bits,
            "block_size": table.block,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        width = table.codes.shape[1] * table.block
        rows: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            inputs,
            attributes,
            dtype=torch.float32,
            shape=[*ids.shape, width],
            version=1,
        )
        if self.offsets is not None:
            groups = rows.reshape(*ids.shape, grid.groups, grid.group_size)
            rows = (groups + functional.embedding(ids, self.offsets)[..., None]).flatten(-2)
        return rows if width == grid.columns else rows[..., : grid.columns]


class _Product(nn.Module):
    """One `MatMulNBits` with its tensors."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.bits, self.block, self.columns = kernel.bits, kernel.block, kernel.columns
        for name in ("codes", "scales", "zero_points"):
            array = getattr(kernel, name)
            tensor = None if array is None else torch.from_numpy(np.ascontiguousarray(array))
            self.register_buffer(name, tensor, persistent=False)

    def emit(self, x: Tensor, accuracy_level: int, bias: Tensor | None = None) -> Tensor:
        inputs = [x, self.codes, self.scales, self.zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        attributes: dict[str, Any] = {
            "K": self.columns, "N": len(self.codes), "bits": self.bits, "block_size": self.block,
            "accuracy_level": accuracy_level,
        }  # fmt: skip
        result: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            inputs,
            attributes,
            dtype=x.dtype,
            shape=[*x.shape[:-1], len(self.codes)],
            version=1,
        )
        return result


@contextlib.contextmanager
def lowered(module: nn.Module, accuracy_level: int | None = None) -> Iterator[None]:
    """Give a module's quantized parts what they write into a graph for ONNX Runtime, for one trace.

    Args:
        module: The module that will be traced; its stored weights are only read.
        accuracy_level: 4 lets all operators round activations to 8 bits; `None` keeps them in float32 where the
            part itself does not round them.

    Raises:
        UnsupportedError: A group size has no operator; the message says which have.
    """
    parts = quantized_parts(module)
    plans = {level: _Plan(level) for level in (1, matmulnbits.INT8_ACTIVATIONS)}

    def plan(part: Quantized) -> _Plan:
        rounds = getattr(part, "activations", None) is not None
        return plans[matmulnbits.INT8_ACTIVATIONS if rounds else accuracy_level or 1]

    for part in parts.values():
        plan(part).see(part)
    try:
        for part in parts.values():
            part._lowered = plan(part).lower(part)
        yield
    finally:
        for part in parts.values():
            part._lowered = None


class _Plan:
    """Lowers parts alike, so that those that read one value can be packed, and share what is equal."""

    def __init__(self, accuracy_level: int) -> None:
        self._level = accuracy_level
        self._digits: dict[tuple[int, int, int], int] = {}
        self._sums: dict[tuple[int, int, int], _Product] = {}
        self._tables: dict[tuple[int, bool], _Lowered] = {}

    def see(self, part: Quantized) -> None:
        """Find how many digits the offsets of a linear need."""
        if part.offsets is None or isinstance(part, QuantizedEmbedding) or not self._extends(part.grid):
            return
        array, key = part.array(), self._key(part.grid)
        found = matmulnbits.digits(array, key[0], key[1])
        if found is not None:
            self._digits[key] = max(found.count, self._digits.get(key, 0))

    def lower(self, part: Quantized) -> _Lowered:
        """Prepare one part; parts that share their weight share the result."""
        is_table = isinstance(part, QuantizedEmbedding)
        key = part.codes.data_ptr(), is_table and part.offsets is not None
        if key not in self._tables:
            array = part.array()
            self._tables[key] = self._table(array) if key[1] else self._linear(array)
        found = self._tables[key]
        if is_table and len(found.products) > 1:
            # Two halves for a product; a look-up has 8-bit codes at any accuracy.
            found = _Lowered(matmulnbits.kernels(part.array(), matmulnbits.INT8_ACTIVATIONS), self._level)
        return found

    def _linear(self, array: QuantizedArray) -> _Lowered:
        grid = array.grid
        if array.offsets is None:
            return _Lowered(matmulnbits.kernels(array, self._level), self._level)
        key = self._key(grid)
        found = None
        if self._extends(grid) and key in self._digits:
            found = matmulnbits.digits(array, key[0], key[1], self._digits[key])
        if found is not None:
            slots = -(-grid.groups // key[1]) * key[1]
            kernel = matmulnbits.extended(array, found, self._level)
            sums = self._summing(grid, slots)
            return _Lowered([kernel], self._level, sums, found.count)
        whole = QuantizedArray(
            Grid(grid.rows, grid.columns, grid.bits, grid.group_size), array.codes, array.scales
        )
        rest = array.offsets + array.scales * np.float32(grid.midpoint)
        factors = torch.from_numpy(np.ascontiguousarray(rest.T))
        sums = self._summing(grid, grid.groups)
        return _Lowered(matmulnbits.kernels(whole, self._level), self._level, sums, offsets=factors)

    def _table(self, array: QuantizedArray) -> _Lowered:
        assert array.offsets is not None
        grid = array.grid
        zeros = np.zeros_like(array.scales, dtype=np.uint8)
        form = Grid(grid.rows, grid.columns, grid.bits, grid.group_size, "integer")
        bare = QuantizedArray(form, array.codes, array.scales, zeros)
        kernels = matmulnbits.kernels(bare, matmulnbits.INT8_ACTIVATIONS)
        return _Lowered(kernels, self._level, offsets=torch.from_numpy(array.offsets))

    def _summing(self, grid: Grid, slots: int) -> _Product:
        key = grid.columns, grid.group_size, slots
        if key not in self._sums:
            self._sums[key] = _Product(matmulnbits.summing(*key))
        return self._sums[key]

    def _extends(self, grid: Grid) -> bool:
        """Say whether digits can follow the weight: its last group must be whole, its kernel single."""
        bits = matmulnbits.kernel_bits(grid, self._level)
        single = bits == 4 or self._level == matmulnbits.INT8_ACTIVATIONS
        return single and grid.columns % grid.group_size == 0

    def _key(self, grid: Grid) -> tuple[int, int, int]:
        return matmulnbits.kernel_bits(grid, self._level), matmulnbits.block_size(grid), grid.columns
