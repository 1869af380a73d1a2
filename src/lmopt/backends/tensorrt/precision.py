"""Which types which hardware computes in, and whether a network has the types that its graph states.

The table is what the builder of TensorRT for RTX 1.7.1 did with graphs of lmopt's for each of its targets
(`tests/backends/tensorrt/test_precision.py` repeats it). It is RTX's table; of the standard TensorRT nothing
is known on a machine without a GPU, so its builder is the judge there.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from lmopt.backends.tensorrt.network import Network
from lmopt.backends.tensorrt.preparing import Prepared
from lmopt.errors import EngineBuildError, UnsupportedPrecisionError

_AMPERE: Final = frozenset({"float32", "float16", "bfloat16", "int8", "int4"})
_ADA: Final = _AMPERE | {"fp8"}
CAN: Final[Mapping[str, frozenset[str]]] = {
    "7.5": frozenset({"float16", "int8"}),
    "8.0": _AMPERE,
    "8.6": _AMPERE,
    "8.9": _ADA,
    "12.0": _ADA,
    "12.1": _ADA,
}
"""Compute capability to the types that weights and products may have; float32 means products in it."""
JUDGED: Final = frozenset({"float32", "float16", "bfloat16", "int8", "int4", "fp8"})
"""Types that the table knows of; what it does not know is left to the builder."""
_FLOATS: Final = ("float32", "float16", "bfloat16")


def types_in_use(network: Network) -> frozenset[str]:
    """Types that hardware must have: those of products, and of all values but float32.

    Float32 outside of products (norms, softmax, angles) is computed by every GPU.
    """
    values = frozenset(network.types()) - {"float32"}
    return (values | frozenset(network.products())) & JUDGED


def require(types: Iterable[str], targets: Iterable[str]) -> None:
    """Refuse types that a target does not compute in, before an engine is built.

    Args:
        types: From `types_in_use`.
        targets: Compute capabilities, such as `"8.9"`; those that the table does not have are left to the builder.

    Raises:
        UnsupportedPrecisionError: Every target and type that do not go together are named.
    """
    wanted = frozenset(types) & JUDGED
    lacking = {one: sorted(wanted - CAN[one]) for one in targets if one in CAN and wanted - CAN[one]}
    if not lacking:
        return
    what = "; ".join(
        f"compute capability {one} does not compute in {', '.join(lacks)}" for one, lacks in lacking.items()
    )
    able = [one for one, can in CAN.items() if wanted <= can]
    raise UnsupportedPrecisionError(
        f"{what} (the graph uses {', '.join(sorted(wanted))}). "
        f"It can be built for {', '.join(able) or 'no target'}. Precision is chosen before the build: load the model "
        "in another type, lmopt.Model.from_pretrained(..., dtype='float16'), or compress it to other widths"
    )


def require_met(network: Network, prepared: Prepared) -> dict[str, int]:
    """Compare the network's types with those that the graph states.

    A strongly typed network keeps its types in the engine. An engine's own inspector would say so again, but needs
    a GPU to load the engine; the run half compares the engine's inputs and outputs when it loads one.

    Returns:
        How many values of each type the network has.

    Raises:
        EngineBuildError: TensorRT has changed a type: of an input, an output, or of quantized weights.
    """
    stated = {one.name: one.dtype for one in (*prepared.inputs, *prepared.outputs)}
    found = {**network.inputs(), **network.outputs()}
    changed = [
        f"{name} is {found.get(name)}, not {dtype}"
        for name, dtype in stated.items()
        if found.get(name) != dtype
    ]
    types = network.types()
    for dtype, count in prepared.weights.items():
        if types.get(dtype, 0) < count:
            changed.append(f"{types.get(dtype, 0)} of {count} weights are in {dtype}")
    if changed:
        raise EngineBuildError(
            f"TensorRT did not take over the types of the graph: {'; '.join(changed)}. The engine was not kept"
        )
    return dict(sorted(types.items()))


def compute_type(network: Network) -> str:
    """Float type that most products are in; that of the outputs where there are none."""
    products = network.products()
    counted = {one: products[one] for one in _FLOATS if products[one]}
    if counted:
        return max(counted, key=lambda one: counted[one])
    return next((one for one in network.outputs().values() if one in _FLOATS), "float32")
