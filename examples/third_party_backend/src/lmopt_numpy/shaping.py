"""Operators that make, move, pick and rearrange values."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype

from lmopt.errors import UnsupportedError
from lmopt.types import AnyArray


def constant(**value: Any) -> AnyArray:
    """A value from the file: `value` is an array, `value_ints` and the like are Python's."""
    ((name, content),) = value.items()
    dtypes = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    return np.asarray(content, dtypes.get(name))


def constant_of_shape(shape: AnyArray, *, value: AnyArray | None = None) -> AnyArray:
    """An array filled with one value, 0.0 by default."""
    return np.full(shape, np.float32(0) if value is None else value.reshape(()))


def cast(x: AnyArray, *, to: int, saturate: int = 1) -> AnyArray:
    """Another element type."""
    return x.astype(tensor_dtype_to_np_dtype(to))


def shape(x: AnyArray, *, start: int = 0, end: int | None = None) -> AnyArray:
    """Sizes of the axes from `start` to `end`."""
    return np.array(x.shape[start:end], np.int64)


def reshape(x: AnyArray, to: AnyArray, *, allowzero: int = 0) -> AnyArray:
    """Another shape; a 0 keeps the size of that axis unless `allowzero`."""
    sizes = [int(size) if size or allowzero else x.shape[axis] for axis, size in enumerate(to)]
    if -1 in sizes and not x.size:
        # NumPy cannot divide by the zero that an empty past brings.
        known = [size for size in sizes if size != -1]
        sizes[sizes.index(-1)] = 0 if 0 not in known else 1
    return x.reshape(sizes)


def flatten(x: AnyArray, *, axis: int = 1) -> AnyArray:
    """Two axes out of many."""
    rows = int(np.prod(x.shape[:axis], dtype=np.int64))
    return x.reshape(rows, x.size // rows if rows else 0)


def expand(x: AnyArray, to: AnyArray) -> AnyArray:
    """Repeat along axes of size 1, in either operand."""
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(size) for size in to)))


def unsqueeze(x: AnyArray, axes: AnyArray) -> AnyArray:
    """Insert axes of size 1."""
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def squeeze(x: AnyArray, axes: AnyArray | None = None) -> AnyArray:
    """Drop axes of size 1."""
    return np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes))


def transpose(x: AnyArray, *, perm: Sequence[int] | None = None) -> AnyArray:
    """Reorder axes."""
    return np.transpose(x, perm)


def concat(*arrays: AnyArray, axis: int) -> AnyArray:
    """Put arrays one after the other."""
    return np.concatenate(arrays, axis)


def split(
    x: AnyArray, sizes: AnyArray | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[AnyArray, ...]:
    """Cut an axis into parts."""
    if sizes is None:
        assert num_outputs is not None
        width = -(-x.shape[axis] // num_outputs)
        cuts = [width * part for part in range(1, num_outputs)]
    else:
        cuts = np.cumsum(sizes)[:-1].tolist()
    return tuple(np.split(x, cuts, axis))


def slice_(
    x: AnyArray,
    starts: AnyArray,
    ends: AnyArray,
    axes: AnyArray | None = None,
    steps: AnyArray | None = None,
) -> AnyArray:
    """A range of each named axis."""
    cut = [slice(None)] * x.ndim
    for index, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        axis = int(axes[index]) if axes is not None else index
        step = int(steps[index]) if steps is not None else 1
        before_first = step < 0 and end < -x.shape[axis]
        cut[axis] = slice(start, None if before_first else end, step)
    return x[tuple(cut)]


def range_(start: AnyArray, limit: AnyArray, delta: AnyArray) -> AnyArray:
    """Evenly spaced numbers."""
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def gather(x: AnyArray, indices: AnyArray, *, axis: int = 0) -> AnyArray:
    """Pick whole slices of an axis."""
    return np.take(x, indices, axis=axis)


def gather_elements(x: AnyArray, indices: AnyArray, *, axis: int = 0) -> AnyArray:
    """Pick single values along an axis."""
    return np.take_along_axis(x, indices, axis)


def gather_nd(x: AnyArray, indices: AnyArray, *, batch_dims: int = 0) -> AnyArray:
    """Pick by index tuples."""
    lead = np.indices(indices.shape[:batch_dims], sparse=True)
    extra = indices.ndim - 1 - batch_dims
    rows = tuple(axis.reshape(axis.shape + (1,) * extra) for axis in lead)
    return x[(*rows, *np.moveaxis(indices, -1, 0))]


def scatter_elements(
    x: AnyArray, indices: AnyArray, updates: AnyArray, *, axis: int = 0, reduction: str = "none"
) -> AnyArray:
    """Write (or add) single values along an axis of a copy."""
    where = list(np.indices(indices.shape, sparse=True))
    where[axis] = np.where(indices < 0, indices + x.shape[axis], indices)
    return _write(x, tuple(where), updates, reduction)


def scatter_nd(x: AnyArray, indices: AnyArray, updates: AnyArray, *, reduction: str = "none") -> AnyArray:
    """Write (or add) by index tuples into a copy."""
    return _write(x, tuple(np.moveaxis(indices, -1, 0)), updates, reduction)


def _write(x: AnyArray, where: tuple[AnyArray, ...], updates: AnyArray, reduction: str) -> AnyArray:
    result = x.copy()
    if reduction == "none":
        result[where] = updates
    elif reduction == "add":
        np.add.at(result, where, updates)
    else:
        raise UnsupportedError(f"backend 'numpy' cannot scatter with reduction {reduction!r}")
    return result


def cumulative_sum(x: AnyArray, axis: AnyArray, *, exclusive: int = 0, reverse: int = 0) -> AnyArray:
    """Running sum along an axis."""
    along = int(axis)
    source = np.flip(x, along) if reverse else x
    total = np.cumsum(source, along, dtype=x.dtype)
    total = total - source if exclusive else total
    return np.flip(total, along) if reverse else total


def triangle(x: AnyArray, k: AnyArray | None = None, *, upper: int = 1) -> AnyArray:
    """Keep one side of the diagonal."""
    return (np.triu if upper else np.tril)(x, 0 if k is None else int(k))


def tile(x: AnyArray, repeats: AnyArray) -> AnyArray:
    """Repeat the whole along each axis."""
    return np.tile(x, repeats)


def pad(
    x: AnyArray,
    pads: AnyArray,
    value: AnyArray | None = None,
    axes: AnyArray | None = None,
    *,
    mode: str = "constant",
) -> AnyArray:
    """Add values around an array."""
    if mode != "constant" or (pads < 0).any():
        raise UnsupportedError(f"backend 'numpy' cannot pad with mode {mode!r} or cut with negative pads")
    widths = [(0, 0)] * x.ndim
    chosen = range(x.ndim) if axes is None else axes.tolist()
    for axis, before, after in zip(chosen, pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True):
        widths[axis] = (int(before), int(after))
    return np.pad(x, widths, constant_values=0 if value is None else value.item())


def one_hot(indices: AnyArray, depth: AnyArray, values: AnyArray, *, axis: int = -1) -> AnyArray:
    """`values[1]` at each index, `values[0]` elsewhere, along a new axis."""
    hot = (indices % int(depth))[..., None] == np.arange(int(depth))
    return np.moveaxis(np.where(hot, values[1], values[0]), -1, axis)


def top_k(
    x: AnyArray, k: AnyArray, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[AnyArray, AnyArray]:
    """The `k` largest (or smallest) along an axis and where they are; ties go to the lower index."""
    order = np.argsort(-x if largest else x, axis=axis, kind="stable")
    where = np.take(order, np.arange(int(np.asarray(k).reshape(()))), axis=axis)
    return np.take_along_axis(x, where, axis), where.astype(np.int64)


def nonzero(x: AnyArray) -> AnyArray:
    """Positions of the values that are not zero, one column each."""
    return np.array(np.nonzero(x), np.int64)


SHAPING: dict[str, Callable[..., Any]] = {
    "Cast": cast, "CastLike": lambda x, like: x.astype(like.dtype), "Concat": concat, "Constant": constant,
    "ConstantOfShape": constant_of_shape, "CumSum": cumulative_sum, "Expand": expand, "Flatten": flatten,
    "Gather": gather, "GatherElements": gather_elements, "GatherND": gather_nd, "Identity": lambda x: x,
    "NonZero": nonzero, "OneHot": one_hot, "Pad": pad, "Range": range_, "Reshape": reshape,
    "ScatterElements": scatter_elements, "ScatterND": scatter_nd, "Shape": shape,
    "Size": lambda x: np.array(x.size, np.int64), "Slice": slice_, "Split": split, "Squeeze": squeeze,
    "Tile": tile, "TopK": top_k, "Transpose": transpose, "Trilu": triangle, "Unsqueeze": unsqueeze,
}  # fmt: skip
