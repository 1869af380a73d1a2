"""Follow queries, keys and values back to the linear that they are cut from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmopt.backends.torch.fused.plan import Columns, Linear, Norm, Source


@dataclass(frozen=True, slots=True)
class Seen:
    """What a part was given and what it returned."""

    path: str
    input: Tensor
    output: Tensor


def find_source(
    heads: Tensor, before: Sequence[Seen], linears: Mapping[str, Linear], norms: Mapping[str, Norm]
) -> Source | None:
    """Find the columns that heads are made of.

    Args:
        heads: `(batch, heads, tokens, head_dim)`, unrotated.
        before: Parts that ran since the layer before.
        linears: Linear parts by path.
        norms: Normalising parts by path.

    Returns:
        The source, or `None` where the heads are not bit by bit what a part returned.
    """
    flat = heads.transpose(1, 2).flatten(2).flatten(0, 1)
    for one in reversed(before):
        if one.path in linears or (one.path in norms and one.output.dim() == 3):
            if columns := _columns(flat, one.output):
                return Source(one.path, columns)
        elif one.path in norms and one.output.dim() == 4 and one.output.shape[-1] == heads.shape[-1]:
            for turned in (False, True):
                after, given = (x.transpose(1, 2) if turned else x for x in (one.output, one.input))
                if after.flatten(2).flatten(0, 1).shape == flat.shape and torch.equal(
                    after.flatten(2).flatten(0, 1), flat
                ):
                    below = find_source(given.transpose(1, 2), before, linears, {})
                    return None if below is None else Source(below.path, below.columns, one.path)
    return None


def _columns(flat: Tensor, output: Tensor) -> Columns | None:
    """Find which columns of an output, by value, make up `(rows, width)`."""
    table = output.flatten(0, -2)
    rows, width = flat.shape
    if len(table) != rows or table.shape[1] < width:
        return None
    if table.shape[1] == width and torch.equal(table, flat):
        return Columns(torch.arange(width), whole=True)
    # Columns that are equal to each other (of a weight of zeros, say) are told apart by their order.
    places: dict[bytes, list[int]] = {}
    for index, column in enumerate(_keys(table)):
        places.setdefault(column, []).append(index)
    found: list[int] = []
    for column in _keys(flat):
        candidates = places.get(column)
        if not candidates:
            return None
        following = found[-1] + 1 if found else candidates[0]
        found.append(following if following in candidates else candidates[0])
    return Columns(torch.tensor(found), whole=False)


def _keys(table: Tensor) -> list[bytes]:
    # float64 holds every smaller type exactly; adding zero makes -0 and 0 one.
    return [column.tobytes() for column in (table.T.double() + 0.0).contiguous().cpu().numpy()]
