"""What became of each point of the space that was tried."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

from lmopt.evaluation import Figure

State = Literal["measured", "screened", "failed", "postponed"]

_LEAST_NOISE: Final = 0.03
"""Speeds that differ by less than this are never told apart: processes of one program differ by as much."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One deployment, and what is known of it.

    Attributes:
        name: What it is, in words.
        recipe: Name of the recipe; `steps` has it in full.
        steps: Steps of compression as plain data.
        stored: Whether the codes of a GGUF file were kept.
        backend: Engine.
        exporter: Exporter that wrote what the engine reads, `None` for none.
        target: Dialect.
        options: Options of the exporter.
        threads: Threads inside one operator.
        is_float: Whether it is the model as it was given.
        simplicity: Less is simpler.
        state: `"measured"`; `"screened"`, put aside by a cheap look; `"failed"`; `"postponed"`, for want of time.
        reason: Why it was not measured, or what should be known of the measurement.
        kind: Of a failure: `"error"`, `"crash"`, `"memory"`, `"time"`, `"budget"`, `"interrupted"`.
        token_p50_ms: Median time between two new tokens.
        token_p95_ms: 95th percentile of it.
        first_token_ms: Time to the first token.
        decode_tokens_per_s: New tokens a second.
        prefill_tokens_per_s: Prompt tokens read a second.
        peak_memory_bytes: Peak of a process that opens it and generates.
        artifact_bytes: Size of its files.
        loss: Perplexity, ratio, KL and more against the float model, on the engine.
        starts: Fresh processes that the speed comes from.
        place: Folder of it inside the study's, or the source itself.
        stages: Stage to seconds that it took.
    """

    name: str
    recipe: str
    steps: tuple[Mapping[str, Any], ...]
    stored: bool
    backend: str
    exporter: str | None
    target: str | None
    options: Mapping[str, Any]
    threads: int
    is_float: bool
    simplicity: tuple[float, ...]
    state: State
    reason: str = ""
    kind: str = ""
    token_p50_ms: Figure | None = None
    token_p95_ms: Figure | None = None
    first_token_ms: Figure | None = None
    decode_tokens_per_s: Figure | None = None
    prefill_tokens_per_s: Figure | None = None
    peak_memory_bytes: int | None = None
    artifact_bytes: int | None = None
    loss: Mapping[str, Any] | None = None
    starts: int = 0
    place: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures that limits and objectives are about, by name; `None` where not known."""
        loss = self.loss or {}
        return {
            "token_p50_ms": _median(self.token_p50_ms),
            "token_p95_ms": _median(self.token_p95_ms),
            "first_token_ms": _median(self.first_token_ms),
            "peak_memory_bytes": self.peak_memory_bytes,
            "artifact_bytes": self.artifact_bytes,
            "perplexity_ratio": loss.get("perplexity_ratio"),
            "kl_mean": loss.get("kl_mean"),
        }

    def noise(self, name: str) -> float:
        """Say how far a figure may be off by chance, as a share of it.

        Speeds: half the distance of the least and the largest round, at least 3 %. Memory 2 %, files 1 %. Quality:
        two standard errors of the ratio, which the choice of text causes.
        """
        if name in ("token_p50_ms", "token_p95_ms", "first_token_ms"):
            one: Figure | None = getattr(self, name)
            if one is None or not one.median:
                return _LEAST_NOISE
            return max(_LEAST_NOISE, (one.most - one.least) / 2 / one.median)
        if name == "perplexity_ratio":
            return 2 * float((self.loss or {}).get("perplexity_ratio_stderr", 0.0))
        return {"peak_memory_bytes": 0.02, "artifact_bytes": 0.01, "kl_mean": 0.1}[name]

    def with_speeds(self, speeds: Sequence[Mapping[str, Any]]) -> "Trial":
        """Take the figures of several starts for those of this trial.

        Args:
            speeds: `Speed.to_dict()` of each.

        Returns:
            The trial with the median of the starts' medians, and the least and largest of theirs: rounds of one
            start agree with each other more than starts do.
        """
        found: dict[str, Any] = {}
        for name in (
            "token_p50_ms", "token_p95_ms", "first_token_ms", "decode_tokens_per_s", "prefill_tokens_per_s",
        ):  # fmt: skip
            figures = [Figure(**one[name]) for one in speeds]
            if len(figures) == 1:
                found[name] = figures[0]
            else:
                found[name] = Figure.of([one.median for one in figures])
        return replace(self, starts=len(speeds), **found)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain data."""
        return {**asdict(self), "figures": self.figures}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Trial":
        """Read what `to_dict` gave, also after a way through JSON."""
        given = {key: value for key, value in content.items() if key != "figures"}
        for name, value in given.items():
            if isinstance(value, Mapping) and set(value) == {"median", "least", "most"}:
                given[name] = Figure(**value)
        return cls(**{**given, "steps": tuple(given["steps"]), "simplicity": tuple(given["simplicity"])})


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Say whether the first is nowhere larger than the second and somewhere smaller.

    >>> dominates((1, 2), (1, 3)), dominates((1, 2), (1, 2))
    (True, False)
    """
    pairs = list(zip(first, second, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _median(figure: Figure | None) -> float | None:
    return None if figure is None or not np.isfinite(figure.median) else figure.median
