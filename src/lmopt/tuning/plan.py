"""What a search is given: everything that stays as it is while it runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmopt.tuning.limits import Constraints
from lmopt.tuning.space import Space
from lmopt.tuning.weights import ModelShape
from lmopt.tuning.workload import Workload


@dataclass(frozen=True, slots=True)
class Plan:
    """A search.

    Attributes:
        source: What every process opens.
        identity: Hash of it.
        label: Name for people.
        reference: Engine that computes the reference where weights cannot be loaded; `None` for eager torch.
        shape: Of its weights; `None` where headers do not say.
        dtype: Type that weights are loaded in.
        device: Where it runs.
        trust: Whether code that comes with the model may run.
        space: Where to look.
        limits: What must be kept.
        objectives: Names, the one that counts most first.
        workload: What is measured.
        text: File of the text that is scored; `None` for random ids.
        calibration: File of text that calibrated steps read; `None` lets the model write one.
        folder: The study's folder.
        trial_seconds: Most time of one piece of work.
        memory_bytes: Most memory of one piece of work.
        seed: Of the sampler.
    """

    source: str
    identity: str
    label: str
    reference: str | None
    shape: ModelShape | None
    dtype: str
    device: str
    trust: bool
    space: Space
    limits: Constraints
    objectives: tuple[str, ...]
    workload: Workload
    text: Path | None
    calibration: Path | None
    folder: Path
    trial_seconds: float
    memory_bytes: int | None
    seed: int = 0

    def settings(self, versions: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, Any]:
        """What two calls must agree in to go on with one search.

        Args:
            versions: Of what the result depends on.
            texts: Hashes of the texts.
        """
        return {
            "model": self.identity,
            "dtype": self.dtype,
            "device": self.device,
            "constraints": asdict(self.limits),
            "objectives": list(self.objectives),
            "workload": asdict(self.workload),
            "recipes": [[one.name, [dict(step) for step in one.steps]] for one in self.space.recipes],
            "routes": [one.name for one in self.space.routes],
            "threads": list(self.space.threads),
            "texts": dict(texts),
            "versions": dict(versions),
        }
