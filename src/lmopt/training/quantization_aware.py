"""Train a quantized model on its own grid: rounded going forward, straight through going back.

Each quantized part gets a float copy of its weight that is trained. The model computes with the copy rounded to the
part's codes, exactly as every engine dequantizes them; the gradient passes through the rounding as if it were not
there, and stops where a weight has left the grid. What comes out is a checkpoint of the same layout: the same bits,
groups and zeros, other codes and, if asked for, other scales.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmopt.backends.torch.quantized import (
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize,
    quantized_parts,
)
from lmopt.backends.torch.quantizing import set_part
from lmopt.backends.torch.rounded import block_of, rounded
from lmopt.compression.layout import QuantizedArray, pack


class StraightThrough(nn.Module):
    """A weight that is trained in float and read rounded, shared by the parts that are tied.

    Args:
        part: The quantized part that it begins as.
        learn_scales: Whether its scales are trained too (Esser et al. 2020, Learned Step Size Quantization,
            arXiv:1902.08153).

    Attributes:
        master: `(rows, columns)` float32, trained.
        scales: `(rows, groups)` float32, a parameter where they are trained and a buffer otherwise.
    """

    scales: Tensor
    zero_points: Tensor | None
    offsets: Tensor | None

    def __init__(self, part: Quantized, *, learn_scales: bool) -> None:
        super().__init__()
        self.grid = part.grid
        self.master = nn.Parameter(dequantize(part))
        # Files store such scales in 16 bits: so they stay.
        self._half = bool((part.scales.half().float() == part.scales).all())
        if learn_scales:
            self.scales = nn.Parameter(part.scales.clone())
        else:
            self.register_buffer("scales", part.scales.clone(), persistent=False)
        self.register_buffer("zero_points", part.zero_points, persistent=False)
        self.register_buffer("offsets", part.offsets, persistent=False)

    def forward(self) -> Tensor:
        """Give the rounded weight, `(rows, columns)` float32, with gradient."""
        # Not in 16 bits, whatever mixed precision there is around: that would be another grid.
        with torch.autocast(self.master.device.type, enabled=False):
            scales = self._scales()
            groups = (self._codes(scales) - self._zero()) * scales[..., None]
            if self.offsets is not None:
                groups = groups + self.offsets[..., None]
            return groups.flatten(1)[:, : self.grid.columns]

    def array(self) -> QuantizedArray:
        """Give the weight as it is stored, in NumPy."""
        with torch.no_grad():
            scales = self._scales()
            codes = self._codes(scales).to(torch.uint8).cpu().numpy()
        found = {"zero_points": self.zero_points, "offsets": self.offsets}
        return QuantizedArray(
            self.grid,
            pack(codes, self.grid),
            scales.detach().cpu().numpy(),
            **{name: one.cpu().numpy() for name, one in found.items() if isinstance(one, Tensor)},
        )

    def _scales(self) -> Tensor:
        """The scales as they will be stored."""
        if not self._half or not self.scales.requires_grad:
            return self.scales
        stored: Tensor = _Half.apply(self.scales)  # type: ignore[no-untyped-call]
        return stored

    def _codes(self, scales: Tensor) -> Tensor:
        """Round to `(rows, groups, group_size)` whole numbers in float32."""
        grid = self.grid
        missing = grid.groups * grid.group_size - grid.columns
        padded = functional.pad(self.master, (0, missing)) if missing else self.master
        groups = padded.reshape(grid.rows, grid.groups, grid.group_size)
        if self.offsets is not None:
            groups = groups - self.offsets[..., None]
        # A scale of 0 stands for a group that is all zero.
        flat = scales == 0
        inverse = torch.where(flat, torch.zeros_like(scales), 1 / torch.where(flat, 1, scales))
        steps = groups * inverse[..., None] + self._zero()
        rounded_steps: Tensor = _Round.apply(steps)  # type: ignore[no-untyped-call]
        return rounded_steps.clamp(0, 2**grid.bits - 1)

    def _zero(self) -> Tensor | float:
        """The code that means zero; 0 where an offset does its work."""
        if self.offsets is not None:
            return 0.0
        if self.zero_points is None:
            return float(self.grid.midpoint)
        return self.zero_points[..., None].to(self.master.dtype)


class StraightThroughLinear(nn.Module):
    """A linear with a `StraightThrough` weight; activations are rounded where the original rounds them.

    Args:
        part: The quantized linear.
        weight: Its weight, shared with the parts that it is tied to.
    """

    bias: Tensor | None

    def __init__(self, part: QuantizedLinear, weight: StraightThrough) -> None:
        super().__init__()
        self.rounded = weight
        self.activations = part.activations
        self.in_features, self.out_features = part.in_features, part.out_features
        kept = None if part.bias is None else nn.Parameter(part.bias.detach().clone())
        self.register_parameter("bias", kept)

    @property
    def weight(self) -> Tensor:
        """The rounded weight."""
        made: Tensor = self.rounded()
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `(..., in_features)`."""
        if self.activations is not None:
            x = x + (rounded(x.detach(), block_of(self.rounded.grid)) - x.detach())
        return functional.linear(x, self.weight.to(x.dtype), self.bias)


class StraightThroughEmbedding(nn.Module):
    """An embedding with a `StraightThrough` weight.

    Args:
        part: The quantized embedding.
        weight: Its weight, shared with the parts that it is tied to.
    """

    def __init__(self, part: QuantizedEmbedding, weight: StraightThrough) -> None:
        super().__init__()
        self.rounded = weight
        self.num_embeddings, self.embedding_dim = part.num_embeddings, part.embedding_dim
        self.padding_idx, self.dtype = part.padding_idx, part.dtype

    @property
    def weight(self) -> Tensor:
        """The rounded weight."""
        made: Tensor = self.rounded()
        return made

    def forward(self, ids: Tensor) -> Tensor:
        """Look up `(...)` ids."""
        return functional.embedding(ids, self.weight).to(self.dtype)


def open_grid(module: nn.Module, *, learn_scales: bool = False) -> list[str]:
    """Put trainable parts in the place of a module's quantized ones. The module is changed.

    Its other weights are left as they are, and so is whether they ask for gradients.

    Args:
        module: A model with quantized parts.
        learn_scales: Whether scales are trained too.

    Returns:
        Paths of the parts, none where nothing is quantized.
    """
    weights: dict[int, StraightThrough] = {}
    found = quantized_parts(module)
    for path, part in found.items():
        key = part.codes.data_ptr()
        if key not in weights:
            weights[key] = StraightThrough(part, learn_scales=learn_scales)
        made: nn.Module
        if isinstance(part, QuantizedEmbedding):
            made = StraightThroughEmbedding(part, weights[key])
        else:
            assert isinstance(part, QuantizedLinear)
            made = StraightThroughLinear(part, weights[key])
        set_part(module, path, made)
    return list(found)


def close_grid(module: nn.Module) -> nn.Module:
    """Put quantized parts back in the place of those of `open_grid`. The module is changed and given back."""
    done: dict[int, Quantized] = {}
    parts = {
        path: part
        for path, part in module.named_modules()
        if isinstance(part, StraightThroughLinear | StraightThroughEmbedding)
    }
    for path, part in parts.items():
        array, device = part.rounded.array(), part.rounded.master.device
        made: Quantized
        if isinstance(part, StraightThroughEmbedding):
            made = QuantizedEmbedding(array, part.dtype, part.padding_idx)
        else:
            made = QuantizedLinear(array, part.bias, activations=part.activations)
        made = made.to(device)
        key = id(part.rounded)
        if key in done:
            made.share(done[key])
        done.setdefault(key, made)
        set_part(module, path, made)
    return module.eval()


def round_on(part: Quantized, weight: Tensor) -> QuantizedArray:
    """Round another weight to the nearest values of a part's own grid.

    Args:
        part: Its grid: form, scales and zeros.
        weight: `(rows, columns)` float32.
    """
    made = StraightThrough(part, learn_scales=False)
    with torch.no_grad():
        made.master.copy_(weight)
    return made.array()


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes as if nothing had happened (Bengio et al. 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        return above[0]


class _Half(torch.autograd.Function):
    """Round to half precision; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().float()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        return above[0]
