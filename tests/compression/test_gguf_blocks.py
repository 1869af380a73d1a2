"""Every block type of GGUF, against gguf's own dequantization."""

import numpy as np
import pytest

from lmopt.compression.gguf_blocks import NAMES, from_gguf
from lmopt.errors import UnsupportedError
from lmopt.safefiles.gguf import BLOCKS

# Where half precision numbers lie in a block: random bytes must not make them NaN.
HALVES = {
    2: (0,),
    3: (0, 2),
    6: (0,),
    7: (0, 2),
    8: (0,),
    10: (80, 82),
    11: (108,),
    12: (0, 2),
    13: (0, 2),
    14: (208,),
}


@pytest.mark.parametrize("kind", NAMES, ids=NAMES.values())
def test_values_are_those_of_the_file_bit_by_bit(kind: int) -> None:
    gguf = pytest.importorskip("gguf")
    weights, size = BLOCKS[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (6, 512 // weights, size), dtype=np.uint8)
    for place in HALVES[kind]:
        raw[..., place + 1] = (raw[..., place + 1] & 0xBF) | 0x20
    expected = gguf.quants.dequantize(raw.reshape(6, -1), gguf.GGMLQuantizationType(kind)).reshape(6, 512)
    array = from_gguf(kind, raw.reshape(-1), 6, 512)
    assert np.array_equal(array.values(), expected)
    assert len(np.unique(expected)) > 100


def test_other_types_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Q4_0, Q4_1"):
        from_gguf(16, np.zeros(66, np.uint8), 1, 256)
