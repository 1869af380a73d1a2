"""Carry the blocks of GGUF tensors over into lmopt's layout without changing a value.

Every type here is codes with a scale and a zero a group, only interleaved differently; see
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h for the blocks. Scales that a file stores as a
product (`d * scale`) are multiplied out, which is exact: a half precision number times six or eight bits.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lmopt.compression.layout import Codes, Grid, QuantizedArray, pack
from lmopt.errors import UnsupportedError
from lmopt.types import FloatArray

# Codes a byte each, scales, offsets or None: `(rows, groups, group_size)` and `(rows, groups)`.
_Parts = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]


def from_gguf(kind: int, raw: Codes, rows: int, columns: int) -> QuantizedArray:
    """Turn a tensor's bytes into the layout.

    Args:
        kind: GGUF's type id, such as 3 for Q4_1.
        raw: `(bytes,)` uint8, the tensor's data.
        rows: Outputs.
        columns: Inputs, the contiguous axis.

    Raises:
        UnsupportedError: The type has no such form.
    """
    if kind not in _TYPES:
        raise UnsupportedError(f"GGUF type {kind} is no grid of groups; {', '.join(NAMES.values())} are")
    bits, group_size, width, read = _TYPES[kind]
    blocks = raw.reshape(rows, -1, width)
    codes, scales, offsets = read(blocks)
    grid = Grid(rows, columns, bits, group_size, "symmetric" if offsets is None else "offset")
    return QuantizedArray(
        grid,
        pack(codes.reshape(rows, grid.groups, group_size), grid),
        np.ascontiguousarray(scales.reshape(rows, grid.groups), np.float32),
        offsets=None
        if offsets is None
        else np.ascontiguousarray(offsets.reshape(rows, grid.groups), np.float32),
    )


def _half(raw: Codes) -> FloatArray:
    """Read two bytes a block as a half precision number."""
    found: FloatArray = np.ascontiguousarray(raw).view("<f2").astype(np.float32)
    return found[..., 0]


def _nibbles(raw: Codes) -> NDArray[Any]:
    """All low halves, then all high ones."""
    joined: NDArray[Any] = np.concatenate([raw & 15, raw >> 4], axis=-1)
    return joined


def _shifted(raw: Codes, width: int, shifts: tuple[int, ...], mask: int) -> NDArray[Any]:
    """Read chunks of `width` bytes once for each shift."""
    chunks = raw.reshape(*raw.shape[:-1], -1, 1, width)
    found: NDArray[Any] = (chunks >> np.array(shifts, np.uint8)[:, None]) & np.uint8(mask)
    return found.reshape(*raw.shape[:-1], -1)


def _fifth_bits(raw: Codes) -> NDArray[Any]:
    return np.unpackbits(raw, axis=-1, bitorder="little") << 4


def _q4_0(blocks: Codes) -> _Parts:
    return _nibbles(blocks[..., 2:]), _half(blocks[..., :2]), None


def _q4_1(blocks: Codes) -> _Parts:
    return _nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _q5_0(blocks: Codes) -> _Parts:
    return _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), _half(blocks[..., :2]), None


def _q5_1(blocks: Codes) -> _Parts:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return codes, _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _q8_0(blocks: Codes) -> _Parts:
    return blocks[..., 2:] ^ 128, _half(blocks[..., :2]), None  # from two's complement to middle 128


def _q2_k(blocks: Codes) -> _Parts:
    scales, codes = blocks[..., :16], _shifted(blocks[..., 16:80], 32, (0, 2, 4, 6), 3)
    d, least = _half(blocks[..., 80:82])[..., None], _half(blocks[..., 82:84])[..., None]
    return codes, d * (scales & 15), -(least * (scales >> 4))


def _q3_k(blocks: Codes) -> _Parts:
    high, low, scales = blocks[..., :32], blocks[..., 32:96], blocks[..., 96:108]
    codes = _shifted(low, 32, (0, 2, 4, 6), 3) | _shifted(high, 32, tuple(range(8)), 1) << 2
    sixths = _shifted(scales[..., :8], 8, (0, 4), 15) | _shifted(scales[..., 8:], 4, (0, 2, 4, 6), 3) << 4
    return codes, _half(blocks[..., 108:110])[..., None] * (sixths.astype(np.float32) - 32), None


def _k_scales(blocks: Codes) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scales and offsets of the eight groups of a Q4_K or Q5_K block."""
    d, least = _half(blocks[..., :2])[..., None], _half(blocks[..., 2:4])[..., None]
    first, second, both = (blocks[..., start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([first & 63, (both & 15) | ((first >> 2) & 48)], axis=-1)
    offsets = np.concatenate([second & 63, (both >> 4) | ((second >> 2) & 48)], axis=-1)
    return d * scales, -(least * offsets)


def _q4_k(blocks: Codes) -> _Parts:
    return _shifted(blocks[..., 16:], 32, (0, 4), 15), *_k_scales(blocks)


def _q5_k(blocks: Codes) -> _Parts:
    high = _shifted(blocks[..., 16:48], 32, tuple(range(8)), 1) << 4
    return _shifted(blocks[..., 48:], 32, (0, 4), 15) | high, *_k_scales(blocks)


def _q6_k(blocks: Codes) -> _Parts:
    low, high, scales = blocks[..., :128], blocks[..., 128:192], blocks[..., 192:208]
    codes = _shifted(low, 64, (0, 4), 15) | _shifted(high, 32, (0, 2, 4, 6), 3) << 4
    factors = np.ascontiguousarray(scales).view(np.int8).astype(np.float32)
    return codes, _half(blocks[..., 208:210])[..., None] * factors, None


# Type id -> (bits, group size, bytes a block, reader).
_TYPES: Final[Mapping[int, tuple[int, int, int, Callable[[NDArray[Any]], _Parts]]]] = {
    2: (4, 32, 18, _q4_0),
    3: (4, 32, 20, _q4_1),
    6: (5, 32, 22, _q5_0),
    7: (5, 32, 24, _q5_1),
    8: (8, 32, 34, _q8_0),
    10: (2, 16, 84, _q2_k),
    11: (3, 16, 110, _q3_k),
    12: (4, 32, 144, _q4_k),
    13: (5, 32, 176, _q5_k),
    14: (6, 16, 210, _q6_k),
}
NAMES: Final[Mapping[int, str]] = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
}  # fmt: skip
"""Types that can be carried over, by id."""
