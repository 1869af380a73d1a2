"""Share outliers between activations and weights, so that both can be rounded to 8 bits (SmoothQuant)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lmopt.compression.round_to_nearest import Form, Quantize
from lmopt.compression.scaling import smoothing_scales
from lmopt.compression.statistics import Statistics
from lmopt.errors import UnsupportedOptionError
from lmopt.types import FloatArray


@dataclass(frozen=True, slots=True)
class SmoothQuant(Quantize):
    """Divide inputs by `max|x|**alpha / max|w|**(1-alpha)`, multiply weights by it, then round weights.

    Xiao et al. 2022, "SmoothQuant", arXiv:2211.10438. Weights and activations take 8 bits (W8A8);
    `activations=None` leaves the latter in float, and then there is little reason to smooth anything.

    Attributes:
        alpha: How much of the difficulty goes from the activations to the weights, 0 to 1.
    """

    name: ClassVar[str] = "smoothquant"
    needs_texts: ClassVar[bool] = True
    reads_sources: ClassVar[bool] = True

    bits: int = 8
    activations: int | None = 8
    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Check every field."""
        Quantize.__post_init__(self)
        if isinstance(self.alpha, bool) or not 0 <= self.alpha <= 1:
            raise UnsupportedOptionError(f"alpha is {self.alpha!r}; expected a number from 0 to 1")

    def scales(
        self, weights: Sequence[FloatArray], forms: Sequence[Form], statistics: Statistics
    ) -> FloatArray | None:
        """Choose the scales of linears that read one tensor; see `smoothing_scales`."""
        return smoothing_scales(weights, statistics, self.alpha)
