"""Recognise rotations by position: the parts that make the angles, and what is done with them."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmopt.backends.torch.fused.evidence import agree
from lmopt.backends.torch.fused.operators import rotate
from lmopt.backends.torch.fused.plan import Rotary
from lmopt.backends.torch.fused.reason import InexpressibleError

# GroupQueryAttention takes tables of a multiple of 8 columns, and heads of a multiple of 16 with them.
_TABLE_MULTIPLE, _HEAD_MULTIPLE = 8, 16


@dataclass(slots=True)
class AngleCall:
    """One call of a part that makes cosines and sines."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: tuple[Tensor, Tensor]


def is_angles(output: object) -> bool:
    """Say whether something is a pair of cosines and sines: squares that add up to a constant."""
    if not isinstance(output, tuple | list) or len(output) != 2:
        return False
    cos, sin = output
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor) or cos.shape != sin.shape:
        return False
    if not cos.is_floating_point() or cos.dim() < 2:
        return False
    length = cos.float().square() + sin.float().square()
    return bool(torch.allclose(length, length.flatten()[0], rtol=2e-2))


@contextlib.contextmanager
def without_rotation(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Let angle parts of a twin answer cosine 1 and sine 0 while the block runs."""
    before = [part.forward for part in parts]
    for part, forward in zip(parts, before, strict=True):
        part.forward = still(forward)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def still(forward: Any) -> Any:
    """Wrap the forward of an angle part so that it answers cosine 1 and sine 0."""

    def answer(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cos, _ = forward(*args, **kwargs)
        return torch.ones_like(cos), torch.zeros_like(cos)

    return answer


class RotaryTables:
    """Finds the tables that rotate a layer's heads, each computed once.

    Args:
        calls: Calls of angle parts in the probe.
        parts: Parts of the twin by path.
        positions: Position ids of the probe, `(batch, tokens)`.
        context: Positions that the tables must hold.
    """

    def __init__(
        self, calls: Sequence[AngleCall], parts: Mapping[str, nn.Module], positions: Tensor, context: int
    ) -> None:
        self._positions = positions
        self._context = context
        self._parts = parts
        self._calls = calls
        self._found: list[Rotary] | None = None

    def find(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Rotary | None:
        """Find the rotation that turns the second of each pair into the first.

        Args:
            pairs: Queries, and keys, `(batch, heads, tokens, head_dim)`: rotated and not.

        Returns:
            The tables, or `None` where GroupQueryAttention cannot do what the model does.

        Raises:
            InexpressibleError: The angles depend on the length of the text.
        """
        if self._found is None:
            distinct: list[AngleCall] = []
            for call in self._calls:
                if not any(torch.equal(call.output[0], one.output[0]) for one in distinct):
                    distinct.append(call)
            self._found = [one for call in distinct for one in self._tables(call)]
        head_dim = pairs[0][0].shape[-1]
        for rotary in self._found:
            columns = rotary.cos.shape[1]
            if 2 * columns > head_dim or columns % _TABLE_MULTIPLE or head_dim % _HEAD_MULTIPLE:
                continue
            if all(agree(rotate(bare, self._positions, rotary), turned) for turned, bare in pairs):
                return rotary
        return None

    def _tables(self, call: AngleCall) -> list[Rotary]:
        cos, sin = self._at(call, torch.arange(self._context, device=self._positions.device)[None])
        if cos.dim() != 3 or cos.shape[:2] != (1, self._context):
            return []
        near = self._at(call, self._positions)
        here = self._positions
        if not (
            torch.equal(cos[0][here], near[0].expand(*here.shape, -1))
            and torch.equal(sin[0][here], near[1].expand(*here.shape, -1))
        ):
            raise InexpressibleError(
                f"the rotary angles of {call.path} depend on the length of the text; a table by position "
                "cannot hold them"
            )
        cos, sin = cos[0], sin[0]
        half = cos.shape[1] // 2
        # Each angle is there twice, once for either of the entries that turn together, or once.
        if torch.equal(cos[:, :half], cos[:, half:]):
            cos, sin = cos[:, :half], sin[:, :half]
        elif torch.equal(cos[:, ::2], cos[:, 1::2]):
            cos, sin = cos[:, ::2], sin[:, ::2]
        return [Rotary(cos.contiguous(), sin.contiguous(), interleaved) for interleaved in (False, True)]

    def _at(self, call: AngleCall, positions: Tensor) -> tuple[Tensor, Tensor]:
        def put(value: Any) -> Any:
            is_positions = isinstance(value, Tensor) and not value.is_floating_point()
            return positions if is_positions and value.shape[-1] == self._positions.shape[-1] else value

        args = tuple(put(one) for one in call.args)
        kwargs = {name: put(one) for name, one in call.kwargs.items()}
        with torch.no_grad():
            cos, sin = self._parts[call.path](*args, **kwargs)
        return cos, sin
