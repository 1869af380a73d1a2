"""Random numbers that depend on what they are for, never on what was drawn before.

A shared stream of random numbers would give a row other tokens when its neighbours change. Here each
number is a pure function of (seed, sequence, position): Philox4x64-10, the counter-based generator of
Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, keyed by the
first two and counting the third. Written out in Python integers because one number costs 4 us this
way, and 8 us through a `numpy.random.Philox` object (which gives the same bits; a test compares).
"""

import secrets
from typing import Final

_MASK: Final = (1 << 64) - 1
_MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS: Final = 10


def philox(key: tuple[int, int], counter: int) -> int:
    """First 64-bit word of the Philox4x64-10 block of `key` at `counter`."""
    key0, key1 = key
    c0, c1, c2, c3 = counter, 0, 0, 0
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 64) ^ c1 ^ key0,
            product1 & _MASK,
            (product0 >> 64) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0


def uniform(seed: int, sequence: int, position: int) -> float:
    """Draw from [0, 1), with 53 random bits.

    Args:
        seed: Seed of the row, `0 .. 2**64 - 1`.
        sequence: Number of the sequence among those of one prompt.
        position: Tokens before the one that is drawn, prompt included. A prompt that ends with the
            first tokens of a seeded run therefore goes on as that run did.
    """
    return (philox((seed, sequence), position) >> 11) * 2.0**-53


def fresh_seed() -> int:
    """Draw a seed from the operating system, for rows that were given none."""
    return secrets.randbits(64)
