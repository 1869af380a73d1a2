"""The one table of numeric tolerances: how far a result may lie from its float32 reference.

Every gate, check and test takes its limits from here, so that "equal" means one thing everywhere.

The figures of the float rows are promises of lmopt, stricter than what peers check: float32 uses the
tolerance of optimum-onnx's own tests (1e-4 absolute and relative) where `torch.onnx.export(verify=True)`
warns at 5e-3 and 1e-1. The integer rows bound the loss of weight-only quantisation by
Kullback-Leibler divergence, which settles with far fewer tokens than perplexity does (llama.cpp
discussion 4739).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final

from lmopt.errors import UnsupportedOptionError


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits that a candidate's logits must keep, measured against a float32 reference.

    Attributes:
        name: Compute or storage type that the row is for: `"float32"`, `"int4"`, `"int8-activations"`.
        kl_mean: Largest mean of KL(reference || candidate) over positions, in nats.
        top1: Least share of positions with the same most likely token, ties excused, 0 to 1.
        perplexity_ratio: Largest candidate perplexity over reference perplexity, or its inverse.
        atol: Absolute part of the limit on `|candidate - reference|`; `None` where the type's own
            rounding makes a bound on single logits meaningless.
        rtol: Part of that limit that grows with `|reference|`.
        tie: Two logits are a tie where they differ by at most twice `tie + tie * |reference|`: the
            rounding of the type itself then decides which of them is largest.
    """

    name: str
    kl_mean: float
    top1: float
    perplexity_ratio: float
    atol: float | None = None
    rtol: float = 0.0
    tie: float = 1e-4

    def to_dict(self) -> dict[str, Any]:
        """Give the limits as plain numbers for a manifest."""
        return asdict(self)


# lmopt's acceptance table, rows 17 (float32), 18 (half types) and 19 (weight-only integers);
# float32's perplexity ratio is 21.440 +- 0.01 on SmolLM2. `tie` of a half type is its machine epsilon.
TOLERANCES: Final[Mapping[str, Tolerance]] = MappingProxyType(
    {
        row.name: row
        for row in (
            Tolerance("float32", kl_mean=1e-8, top1=1.0, perplexity_ratio=1.0005, atol=1e-4, rtol=1e-4),
            Tolerance("float16", kl_mean=1e-4, top1=0.995, perplexity_ratio=1.001, tie=2.0**-10),
            Tolerance("bfloat16", kl_mean=5e-4, top1=0.99, perplexity_ratio=1.005, tie=2.0**-7),
            # Not weights but activations: kernels that round them to 8 bits a block (`accuracy_level=4`).
            # Measured on text: SmolLM2's Q4_1 grid KL 0.0033, top-1 97.1 %. The gate's few dozen positions,
            # in six scripts, scatter more: up to 0.013 and 84 % for SmolLM2 damaged by 4-bit symmetric
            # weights, 0.008 and 91 % for seeded tiny models. A lost offset gives 0.4.
            Tolerance("int8-activations", kl_mean=3e-2, top1=0.75, perplexity_ratio=1.02),
            # Weights and activations in E4M3. The kit's tiny Llama: KL 0.0024, top-1 94 %.
            Tolerance("fp8-products", kl_mean=3e-2, top1=0.75, perplexity_ratio=1.02),
            # Keys and values in 8 bits. SmolLM2 on 256 tokens of wiki: KL 0.0015 to 0.0031 by the
            # texts that the scales were measured on, top-1 97 to 99 %.
            Tolerance("int8-cache", kl_mean=1e-2, top1=0.85, perplexity_ratio=1.01),
            Tolerance("int8", kl_mean=5e-3, top1=0.98, perplexity_ratio=1.005),
            Tolerance("int4", kl_mean=5e-2, top1=0.90, perplexity_ratio=1.05),
        )
    }
)


def tolerance_for(dtype: str) -> Tolerance:
    """Look up the limits of a type.

    Args:
        dtype: `"float32"`, `"float16"`, `"bfloat16"`, `"int8-activations"`, `"fp8-products"`,
            `"int8-cache"`, `"int8"` or `"int4"`.

    Raises:
        UnsupportedOptionError: The table has no such row.
    """
    if dtype not in TOLERANCES:
        raise UnsupportedOptionError(
            f"no tolerance is known for dtype {dtype!r}; the table has {', '.join(TOLERANCES)}. "
            "Pass one of these, or a Tolerance of your own as tolerance=."
        )
    return TOLERANCES[dtype]
