"""Divide what linears read by scales, in what comes before them, without changing the model.

What comes before is found by trial: a norm or a linear is a producer of an input if dividing it and
multiplying the readers leaves the result as it was: of the block, or of the model where several blocks read. That
covers norms with a weight `w` or `1 + w`, the linear branch of a gated MLP, values of attention, grouped or not, and
leaves alone what does not fit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from lmopt.backends.torch.quantizing import is_conv1d, matrix_of, set_matrix

# Share of what the scales alone would change that may be left of it, by the order of operations. Of nine tokens in
# ten: a residual stream may hold tokens so large that all else is within their rounding.
_LEFT: Final = 1e-2
_TOKENS: Final = 0.9

Kind = Literal["weight", "one plus weight", "rows"]


@dataclass(frozen=True, slots=True)
class Producer:
    """What makes an input of linears, and can make it divided by scales.

    Attributes:
        module: A norm or a linear.
        kind: `"weight"` of a norm multiplies; or `1 + weight` does; or it is a linear's rows.
        head_dim: Width of an attention head, 0 where the producer has one value for each input.
        repeats: Heads that read the same values.
    """

    module: Any
    kind: Kind
    head_dim: int = 0
    repeats: int = 1

    def own(self, scales: Tensor) -> Tensor:
        """Give the producer's own values one scale each, of those of the inputs that they make."""
        if self.repeats == 1:
            return scales
        grouped = scales.reshape(-1, self.repeats, self.head_dim)
        return grouped.log().mean(1).exp().flatten()

    def spread(self, own: Tensor) -> Tensor:
        """Give every input the scale of the value that it is."""
        if self.repeats == 1:
            return own
        return own.reshape(-1, 1, self.head_dim).expand(-1, self.repeats, -1).flatten()

    def divide(self, own: Tensor) -> None:
        """Divide what it makes; its parameters are replaced, not written to."""
        part = self.module
        if self.kind == "rows":
            set_matrix(part, matrix_of(part) / own[:, None])
        else:
            shift = 1.0 if self.kind == "one plus weight" else 0.0
            part.weight = nn.Parameter((part.weight + shift) / own - shift, part.weight.requires_grad)
        if getattr(part, "bias", None) is not None:
            part.bias = nn.Parameter(part.bias / own, part.bias.requires_grad)


def multiply(parts: Sequence[Any], scales: Tensor) -> None:
    """Multiply the columns of linears."""
    for part in parts:
        set_matrix(part, matrix_of(part) * scales)


def find_producer(
    parts: Sequence[nn.Module], readers: Sequence[nn.Module], run: Callable[[], Tensor]
) -> Producer | None:
    """Find the part that can take the scales of some linears.

    Args:
        parts: Where to look, such as all parts of a block; they are as they were afterwards.
        readers: Linears that read one tensor.
        run: Runs the block, or the model, on some text.

    Returns:
        The producer, or `None` where none can.
    """
    with torch.no_grad():
        expected = run()
        width = matrix_of(readers[0]).shape[1]
        random = torch.Generator().manual_seed(0)
        trial = torch.empty(width).uniform_(0.5, 2.0, generator=random).to(expected)
        with _restored(readers):
            multiply(readers, trial)
            undivided = (run() - expected).norm(dim=-1).flatten()
        for producer in _candidates(parts, readers):
            own = producer.own(trial)
            with _restored([producer.module, *readers]):
                producer.divide(own.to(producer.module.weight.dtype))
                multiply(readers, producer.spread(own))
                left = (run() - expected).norm(dim=-1).flatten()
            if float((left / undivided).nan_to_num(1.0).float().quantile(_TOKENS)) <= _LEFT:
                return producer
    return None


def _candidates(parts: Sequence[nn.Module], readers: Sequence[nn.Module]) -> Iterator[Producer]:
    """List parts whose size fits."""
    width = matrix_of(readers[0]).shape[1]
    said = (getattr(one, "head_dim", None) for one in parts)
    head_dims = {one for one in said if isinstance(one, int)}
    for part in parts:
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor) or part in readers:
            continue
        if weight.shape == (width,):
            yield Producer(part, "weight")
            yield Producer(part, "one plus weight")
        elif weight.dim() == 2 and (type(part) is nn.Linear or is_conv1d(part)):
            rows = matrix_of(part).shape[0]
            if rows == width:
                yield Producer(part, "rows")
            for head_dim in head_dims:
                if rows < width and width % rows == 0 and rows % head_dim == 0:
                    yield Producer(part, "rows", head_dim, width // rows)


@contextmanager
def _restored(parts: Sequence[Any]) -> Iterator[None]:
    """Put parameters back that were replaced meanwhile."""
    before = [(part, dict(part._parameters)) for part in parts]
    try:
        yield
    finally:
        for part, parameters in before:
            part._parameters.update(parameters)
