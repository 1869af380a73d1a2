"""What a deployment must keep, and what it should be good at."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from lmopt.errors import UnsupportedOptionError
from lmopt.evaluation.tolerances import TOLERANCES

OBJECTIVES: Final[Mapping[str, str]] = {
    "latency": "token_p50_ms",
    "size": "artifact_bytes",
    "quality": "perplexity_ratio",
    "memory": "peak_memory_bytes",
    "first_token": "first_token_ms",
}
"""What can be made small, and the figure that it is measured by."""

DEFAULT_OBJECTIVES: Final = ("latency", "size", "quality")

LABELS: Final[Mapping[str, tuple[str, str]]] = {
    "token_p50_ms": ("time of a token, median", "ms"),
    "token_p95_ms": ("time of a token, 95th percentile", "ms"),
    "first_token_ms": ("time to the first token", "ms"),
    "peak_memory_bytes": ("peak memory", "bytes"),
    "artifact_bytes": ("size of the files", "bytes"),
    "perplexity_ratio": ("perplexity ratio", ""),
    "kl_mean": ("mean KL divergence", "nats"),
}
"""Figure to its name for people and its unit."""


@dataclass(frozen=True, slots=True)
class Constraints:
    """Limits that a deployment must keep, all of them; `None` sets none.

    Attributes:
        token_p50_ms: Median time between two new tokens, in milliseconds.
        token_p95_ms: 95th percentile of it.
        first_token_ms: Time from the call with the prompt to the first new token, in milliseconds.
        peak_memory_bytes: Most resident memory of a process that opens the model and generates, Python included.
        artifact_bytes: Size of all files of the deployment.
        perplexity_ratio: Perplexity on the engine over that of the float model in eager mode, from 1.
        kl_mean: Mean KL divergence of the engine's logits from the float model's, in nats.

    Raises:
        UnsupportedOptionError: A limit is no positive number, or a ratio is below 1.
    """

    token_p50_ms: float | None = None
    token_p95_ms: float | None = None
    first_token_ms: float | None = None
    peak_memory_bytes: int | None = None
    artifact_bytes: int | None = None
    perplexity_ratio: float | None = None
    kl_mean: float | None = None

    def __post_init__(self) -> None:
        """Check every limit."""
        for one in fields(self):
            value = getattr(self, one.name)
            if value is None:
                continue
            sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            least = 1.0 if one.name == "perplexity_ratio" else 0.0
            if not sound or value <= 0 or value < least:
                raise UnsupportedOptionError(
                    f"the limit {one.name} is {value!r}; expected a number of at least {least:g}"
                )

    @classmethod
    def of(cls, given: "Constraints | Mapping[str, Any] | None") -> "Constraints":
        """Take limits as an object or as a mapping.

        Where neither perplexity ratio nor KL is limited, the ratio is, by the widest row of lmopt's table: a
        deployment that says something else is no deployment of the model.

        Raises:
            UnsupportedOptionError: A name is unknown or a value impossible.
        """
        if given is None or isinstance(given, Mapping):
            known = {one.name for one in fields(cls)}
            if unknown := sorted(set(given or {}) - known):
                raise UnsupportedOptionError(
                    f"there is no limit {unknown[0]!r}; limits are {', '.join(sorted(known))}"
                )
            given = cls(**(given or {}))
        if given.perplexity_ratio is None and given.kl_mean is None:
            return cls(**{**asdict(given), "perplexity_ratio": TOLERANCES["int4"].perplexity_ratio})
        return given

    def given(self) -> dict[str, float]:
        """Figure to its limit, for those that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def excesses(self, figures: Mapping[str, float | None]) -> dict[str, float]:
        """Say by how much each limit is passed.

        Args:
            figures: Measured, estimated or bounded values by name; those that are missing count as kept.

        Returns:
            Logarithm of figure over limit for each limit with a figure: above 0 where it is passed.
        """
        found = {}
        for name, limit in self.given().items():
            value = figures.get(name)
            if value is not None:
                # NaN passes every limit.
                found[name] = math.log(max(value, 1e-12) / limit) if math.isfinite(value) else math.inf
        return found

    def broken(self, figures: Mapping[str, float | None]) -> list[str]:
        """Say in words which limits are passed."""
        return [
            f"{LABELS[name][0]} {show(name, figures[name])} > {show(name, self.given()[name])}"
            for name, excess in self.excesses(figures).items()
            if excess > 0
        ]


def check_objectives(given: Sequence[str]) -> tuple[str, ...]:
    """Check names of objectives, the first of which counts most.

    Raises:
        UnsupportedOptionError: There is none, one is unknown, or one is given twice.
    """
    names = (given,) if isinstance(given, str) else tuple(given)
    unknown = [one for one in names if one not in OBJECTIVES]
    if not names or unknown or len(set(names)) < len(names):
        raise UnsupportedOptionError(
            f"objectives are {', '.join(names) or 'none'}; expected some of {', '.join(OBJECTIVES)}, each once, "
            "the one that counts most first"
        )
    return names


def show(name: str, value: float | None) -> str:
    """Write a figure for people.

    >>> show("artifact_bytes", 98_400_000), show("token_p50_ms", 6.3124), show("perplexity_ratio", 1.00839)
    ('98.4 MB', '6.31 ms', '1.0084')
    """
    if value is None:
        return "-"
    unit = LABELS[name][1]
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    if name == "perplexity_ratio":
        return f"{value:.4f}"
    return f"{value:.3g} {unit}".strip()
