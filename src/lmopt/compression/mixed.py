"""Give each weight the width that it deserves, under a budget."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

from lmopt.compression.layout import check_form
from lmopt.compression.round_to_nearest import Quantize
from lmopt.compression.step import plain_fields
from lmopt.errors import UnsupportedOptionError

_LEAST_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Mixed:
    """Choose widths by measured sensitivity, then quantize by another step.

    What a rounding error `E` of a weight costs is predicted from the curvature of the model's own predictions:
    the KL divergence of a token grows by `1/2 sum_n b_n (E A E^T)_nn`, `A` being the second moments of the
    inputs and `b_n` those of the gradients at the outputs, for next tokens drawn from the model (a Kronecker
    factored Fisher matrix with a diagonal output factor; Martens & Grosse 2015, arXiv:1503.05671). Widths are then
    raised where a bit buys most. Linears that read the same tensor get one width, so that engines can still
    compute them in one product.

    Attributes:
        quantizer: How weights are quantized, such as `GPTQ(group_size=64)`; its `bits` do not matter. Weights with
            an override keep it.
        average_bits: Budget: bits a weight on average over everything that the step quantizes,
            scales and zeros counted.
        choices: Widths that are tried, rising.
        group_sizes: Group sizes that are tried with each width; the quantizer's alone where there are none.
        tokens: Calibration tokens that sensitivities are measured on, at least 64.

    Raises:
        UnsupportedOptionError: A value is impossible.
    """

    name: ClassVar[str] = "mixed"
    needs_texts: ClassVar[bool] = True
    target: ClassVar[str] = "lmopt.backends.torch.sensitivity:by_budget"

    quantizer: Quantize = field(default_factory=Quantize)
    average_bits: float = 5.0
    choices: Sequence[int] = (3, 4, 5, 6, 8)
    group_sizes: Sequence[int] = ()
    tokens: int = 8192

    def __post_init__(self) -> None:
        """Check every field."""
        if not isinstance(self.quantizer, Quantize) or getattr(self.quantizer, "fold_only", False):
            raise UnsupportedOptionError(
                f"quantizer is {self.quantizer!r}; expected a quantizer such as GPTQ()"
            )
        if len(self.choices) < 2 or list(self.choices) != sorted(set(self.choices)):
            raise UnsupportedOptionError(f"choices are {self.choices!r}; expected two or more rising widths")
        for bits, group_size in itertools.product(
            self.choices, self.group_sizes or (self.quantizer.group_size,)
        ):
            check_form(bits, group_size)
        if not self.choices[0] < self.average_bits <= 16:
            raise UnsupportedOptionError(
                f"average_bits is {self.average_bits!r}; expected more than {self.choices[0]}, the narrowest "
                "choice, and at most 16"
            )
        if type(self.tokens) is not int or self.tokens < _LEAST_TOKENS:
            raise UnsupportedOptionError(f"tokens is {self.tokens!r}; expected at least {_LEAST_TOKENS}")

    @property
    def reads_sources(self) -> bool:
        """Whether encoder-decoders are taken too: as the quantizer does."""
        return not self.quantizer.needs_texts or getattr(self.quantizer, "reads_sources", False)

    @property
    def bits(self) -> int:
        """The narrowest width that may come out."""
        return min(self.choices)

    def options(self) -> list[dict[str, int]]:
        """List bits and group size of all forms that a weight may get, the smallest first."""
        sizes = self.group_sizes or (self.quantizer.group_size,)
        found = [{"bits": bits, "group_size": size} for bits, size in itertools.product(self.choices, sizes)]
        return sorted(found, key=lambda one: one["bits"] + self.quantizer.scale_bits / one["group_size"])

    def with_forms(self, forms: Mapping[str, Mapping[str, int]]) -> Quantize:
        """Give the step that quantizes each weight with its own width and group size.

        Args:
            forms: By path of the weight.
        """
        return replace(self.quantizer, overrides={**forms, **self.quantizer.overrides})

    def to_dict(self) -> dict[str, Any]:
        """Give the step as plain data for a recipe."""
        return plain_fields(self)


@dataclass(frozen=True, slots=True)
class Candidate:
    """Weights that get one width.

    Attributes:
        paths: Which.
        costs: Predicted loss for each choice.
        bytes: Bytes for each choice, roughly rising: what fills a last group up may disturb the order.
    """

    paths: tuple[str, ...]
    costs: tuple[float, ...]
    bytes: tuple[int, ...]


def choose_widths(candidates: Sequence[Candidate], budget_bytes: int) -> list[int]:
    """Spend a budget where a byte buys most.

    Every candidate begins with its first choice. The step up with the best gain a byte, over one or several
    choices at once, is taken until none fits.

    Args:
        candidates: Weights to choose for.
        budget_bytes: Bytes for all of them.

    Returns:
        Index of the choice for each.

    Raises:
        UnsupportedOptionError: The narrowest choices exceed the budget.
    """
    chosen = [0] * len(candidates)
    used = sum(one.bytes[0] for one in candidates)
    if used > budget_bytes:
        raise UnsupportedOptionError(
            f"the narrowest widths already take {used:,} bytes; the budget is {budget_bytes:,}. Raise average_bits, "
            "take larger groups, or quantize embedding and head with fewer bits"
        )
    while True:
        best: tuple[float, int, int] | None = None
        for number, one in enumerate(candidates):
            now = chosen[number]
            for choice in range(now + 1, len(one.bytes)):
                more = one.bytes[choice] - one.bytes[now]
                if used + more > budget_bytes:
                    continue
                # A better form that takes no more bytes is for nothing.
                gain = (one.costs[now] - one.costs[choice]) / max(more, 1e-9)
                if gain > 0 and (best is None or gain > best[0]):
                    best = gain, number, choice
        if best is None:
            return chosen
        _, number, choice = best
        used += candidates[number].bytes[choice] - candidates[number].bytes[chosen[number]]
        chosen[number] = choice
