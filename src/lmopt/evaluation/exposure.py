"""Memorisation: how much easier a model finds a secret that it was trained on than any other of its kind.

The measure is the exposure of Carlini, Liu, Erlingsson, Kos and Song, "The Secret Sharer: evaluating and testing
unintended memorization in neural networks", USENIX Security 2019: put a made-up secret (a canary) into the training
data and see which rank its log-perplexity has among all secrets that it could have been.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from lmopt.contracts import Engine
from lmopt.errors import InputError
from lmopt.generation import score
from lmopt.types import IntArray

SAMPLES: Final = 1024
_FEWEST: Final = 100
"""Candidates below which a distribution is not fitted to them."""
_FARTHEST: Final = 38.0
"""Standard deviations beyond which the normal density is no number any more."""


class Encoder(Protocol):
    """Turns a text into ids; a `lmopt.Tokenizer` does."""

    def encode(self, text: str) -> list[int]:
        """Give the ids of a text."""
        ...


@dataclass(frozen=True, slots=True)
class Exposure:
    """How exposed one secret is.

    Attributes:
        bits: `log2(space) - log2(rank)`: 0 .. `log2(space)`. About 1 is what chance gives on average; with
            `log2(space)` the secret is the likeliest of all.
        rank: Of the secret among the candidates and itself, from 1; ties count against the model.
        candidates: Other secrets that it was held against.
        space: Number of secrets that it could have been.
        method: `"exact"` where all of them were tried, else `"fitted"`: the tail of a skew-normal distribution
            fitted to the candidates.
        log_perplexity: Negative log-likelihood of the secret's text, in bits.
        candidate_mean: Mean of that over the candidates.
        candidate_std: Its standard deviation.
    """

    bits: float
    rank: int
    candidates: int
    space: int
    method: str
    log_perplexity: float
    candidate_mean: float
    candidate_std: float

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Give the figures in one line."""
        return (
            f"exposure {self.bits:.1f} of {math.log2(self.space):.1f} bits ({self.method}; rank {self.rank} of "
            f"{self.candidates + 1}; {self.log_perplexity:.1f} bits against {self.candidate_mean:.1f} +- "
            f"{self.candidate_std:.1f})"
        )


def exposure(
    engine: Engine,
    secret: Sequence[int] | IntArray,
    candidates: Sequence[Sequence[int] | IntArray],
    *,
    space: int | None = None,
    batch_size: int = 8,
) -> Exposure:
    """Measure the exposure of a secret, given as ids, through any engine.

    Run it on a model and on its compressed form with the same candidates to see what compression forgets.

    Args:
        engine: The model.
        secret: The whole text with the secret in it.
        candidates: The same text with other secrets, drawn at random from the space or all of it.
        space: Number of all secrets; `None` says that the candidates are all others.
        batch_size: Rows in one call of the engine.

    Raises:
        InputError: There are too few candidates, or more than the space has.
    """
    space = len(candidates) + 1 if space is None else space
    exact = space == len(candidates) + 1
    if not candidates or space < len(candidates) + 1 or (not exact and len(candidates) < _FEWEST):
        raise InputError(
            f"{len(candidates)} candidates were given for a space of {space} secrets; give all others, or at least "
            f"{_FEWEST} drawn from them"
        )
    found = score(engine, [secret, *candidates], batch_size=batch_size)
    bits = np.array([-float(row.sum(dtype=np.float64)) / math.log(2) for row in found])
    if not np.isfinite(bits).all():
        raise InputError("a candidate has no finite likelihood under this model, so there is no rank")
    own, others = float(bits[0]), bits[1:]
    rank = 1 + int((others <= own).sum())
    most = math.log2(space)
    exposed = most - math.log2(rank) if exact else min(most, -_log2_tail(own, others))
    return Exposure(
        bits=exposed,
        rank=rank,
        candidates=len(others),
        space=space,
        method="exact" if exact else "fitted",
        log_perplexity=own,
        candidate_mean=float(others.mean()),
        candidate_std=float(others.std()),
    )


def canary_exposure(
    engine: Engine,
    tokenizer: Encoder,
    template: str,
    secret: str,
    *,
    alphabet: str = "0123456789",
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Exposure:
    """Measure the exposure of a secret in a text, such as `"my code is {}"`.

    Args:
        engine: The model.
        tokenizer: The model's.
        template: Text with `{}` where the secret stands.
        secret: What was in the training data, made of letters of the alphabet.
        alphabet: Letters that a secret is made of.
        samples: Candidates to draw where there are more secrets than that; else all are tried.
        seed: Of the candidates.
        progress: Called with the stage's name, the steps done and their total.

    Raises:
        InputError: The template has no `{}`, or the secret has letters of another alphabet.
    """
    if template.count("{}") != 1:
        raise InputError(f"the template {template!r} needs one {{}} where the secret stands")
    letters = list(dict.fromkeys(alphabet))
    if strange := [one for one in secret if one not in letters]:
        raise InputError(
            f"the secret has the letter {strange[0]!r}, which is not in the alphabet {alphabet!r}"
        )
    if not secret or len(letters) < 2:
        raise InputError("a secret needs at least one letter, and an alphabet two")
    space = len(letters) ** len(secret)
    others = draw_secrets(secret, letters, min(samples, space - 1), seed=seed)
    if progress is not None:
        progress("measure exposure", 0, 1)
    rows = [tokenizer.encode(template.replace("{}", one)) for one in (secret, *others)]
    return exposure(engine, rows[0], rows[1:], space=space)


def draw_secrets(secret: str, letters: Sequence[str], count: int, *, seed: int = 0) -> list[str]:
    """Draw different secrets of the same length, other than a given one.

    Args:
        secret: The one to leave out.
        letters: What secrets are made of, all different.
        count: How many; at most all others.
        seed: Of the draw.
    """
    base, chance = len(letters), random.Random(seed)
    space = base ** len(secret)
    own = 0
    for letter in secret:
        own = own * base + letters.index(letter)
    if count >= space - 1:
        numbers = [number for number in range(space) if number != own]
    else:
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            number = chance.randrange(space)
            if number != own:
                drawn[number] = None
        numbers = list(drawn)
    return [_spell(number, letters, len(secret)) for number in numbers]


def _spell(number: int, letters: Sequence[str], length: int) -> str:
    found = []
    for _ in range(length):
        number, letter = divmod(number, len(letters))
        found.append(letters[letter])
    return "".join(reversed(found))


def _log2_tail(value: float, sample: NDArray[np.float64]) -> float:
    """Logarithm of the probability of a value or less, by a skew-normal fitted to a sample by its moments."""
    mean, spread = float(sample.mean()), float(sample.std())
    if spread == 0:
        return 0.0 if value >= mean else -math.inf
    skew = float(((sample - mean) ** 3).mean()) / spread**3
    skew = math.copysign(min(abs(skew), 0.99), skew)  # no skew-normal is more skewed
    part = abs(skew) ** (2 / 3)
    lean = math.copysign(math.sqrt(math.pi / 2 * part / (part + ((4 - math.pi) / 2) ** (2 / 3))), skew)
    scale = spread / math.sqrt(1 - 2 * lean**2 / math.pi)
    place = (value - mean) / scale + lean * math.sqrt(2 / math.pi)
    slope = lean / math.sqrt(1 - lean**2)
    grid = np.linspace(min(place, 0.0) - 12.0, place, 20_001)
    density = np.array([_log_density(float(one), slope) for one in np.maximum(grid, -_FARTHEST)])
    top = float(density.max())
    area = float(np.exp(density - top).sum()) * float(grid[1] - grid[0])
    return min(0.0, (top + math.log(area)) / math.log(2))


def _log_density(at: float, slope: float) -> float:
    """Logarithm of the skew-normal density: `2 phi(x) Phi(slope x)`."""
    turned = slope * at
    if turned > -20:
        log_share = math.log(0.5 * math.erfc(-turned / math.sqrt(2)))
    else:  # erfc would be 0; its asymptotic form
        log_share = -0.5 * turned**2 - math.log(-turned * math.sqrt(2 * math.pi))
    return math.log(2) - 0.5 * at**2 - 0.5 * math.log(2 * math.pi) + log_share
