"""From what lmopt asks to OpenVINO's properties, and back: is it what was asked for?"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lmopt.contracts import EngineRequest
from lmopt.errors import EngineError, UnsupportedError, UnsupportedOptionError, UnsupportedPrecisionError
from lmopt.platform import usable_cpus
from lmopt_openvino.silent import ov

TYPES: Final = {"float32": "f32", "bfloat16": "bf16"}
"""Compute types by lmopt's name and OpenVINO's."""
_REAL: Final = frozenset({"f32", "bf16", "f16"})
# Layers that do the work. Around them OpenVINO may keep more digits than were asked for, but in float32 not fewer,
# except where a value only enters or changes its type.
_WORKERS: Final = frozenset({"FullyConnected", "MatMul", "RNNSeq", "ScaledDotProductAttention"})
_EDGES: Final = frozenset({"Const", "Convert", "Input", "Reorder"})
_OPTIONS: Final = ("dynamic_quantization_group_size", "pinning")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a graph is compiled.

    Attributes:
        dtype: Compute type, of `TYPES`.
        threads: Threads inside one operator.
        group_size: Activations that share a scale when they are rounded to 8 bits on the way into a product with
            a quantized weight; 0 for never.
        pinning: Whether each thread is bound to a CPU.
    """

    dtype: str
    threads: int
    group_size: int
    pinning: bool

    def properties(self) -> dict[str, Any]:
        """OpenVINO's own words for it."""
        return {
            "INFERENCE_PRECISION_HINT": TYPES[self.dtype],
            "EXECUTION_MODE_HINT": "ACCURACY",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            "ENABLE_CPU_PINNING": self.pinning,
            "KV_CACHE_PRECISION": TYPES[self.dtype],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.group_size,
            "CACHE_DIR": "",
        }


def settings_for(request: EngineRequest, dtype: str) -> Settings:
    """Read a request.

    Args:
        request: What was asked for.
        dtype: What the artefact computes in by itself.

    Raises:
        UnsupportedOptionError: An option is unknown or has an impossible value.
        UnsupportedError: The artefact's own type is none of `TYPES`, and no other was asked for.
    """
    options = dict(request.options)
    group_size = options.pop("dynamic_quantization_group_size", 0)
    pinning = options.pop("pinning", False)
    if options:
        raise UnsupportedOptionError(
            f"backend 'openvino' has no option {min(options)!r}; it has {', '.join(_OPTIONS)}, beside device, dtype "
            "and threads"
        )
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 0:
        raise UnsupportedOptionError(
            f"dynamic_quantization_group_size is {group_size!r}; expected 0 (activations stay as they are) or the "
            "number of activations that share a scale, such as 32"
        )
    if not isinstance(pinning, bool):
        raise UnsupportedOptionError(f"pinning is {pinning!r}; expected True or False")
    if request.threads is not None and request.threads < 1:
        raise UnsupportedOptionError(f"threads is {request.threads}; expected at least 1")
    compute = dtype if request.dtype == "auto" else request.dtype
    if compute not in TYPES:
        raise UnsupportedError(
            f"the artefact computes in {compute}, backend 'openvino' in {', '.join(TYPES)}: ask for one by dtype=..."
        )
    if group_size and compute != "float32":
        raise UnsupportedOptionError(
            f"dynamic_quantization_group_size has no effect in {compute}; leave it out, or ask for dtype='float32'"
        )
    return Settings(
        compute,
        request.threads or usable_cpus(),
        group_size,
        pinning,
    )


def check_properties(compiled: Any, settings: Settings) -> None:
    """Ask a compiled graph for each property that was set.

    Raises:
        EngineError: One is not what was asked for.
    """
    for name, wanted in settings.properties().items():
        if name == "CACHE_DIR":
            continue  # of the core, not of a graph
        given = compiled.get_property(name)
        if _word(given) != _word(wanted):
            raise EngineError(
                f"OpenVINO {ov.__version__} made {name} {_word(given)}; asked for {_word(wanted)}"
            )


def _word(value: Any) -> str:
    kind = ov.Type
    if isinstance(value, kind):
        return {kind.f32: "f32", kind.bf16: "bf16", kind.f16: "f16", kind.u8: "u8"}.get(value, str(value))
    return str(getattr(value, "name", value)).upper() if not isinstance(value, str) else value


def check_precision(layers: Iterable[Mapping[str, str]], dtype: str) -> None:
    """Hold the type that each layer really computes in against what was asked for.

    The hint is a hint: a graph whose weights are bfloat16 computes in bfloat16 although the compiled graph states
    the hint float32.

    Args:
        layers: Of `executed`.
        dtype: Compute type.

    Raises:
        UnsupportedPrecisionError: A layer computes in another type.
    """
    wanted = TYPES[dtype]
    for one in layers:
        kind, given = one["layerType"], one["runtimePrecision"]
        if (
            given not in _REAL
        ):  # that of quantized weights; what they are multiplied in stands behind the kernel's name
            given = one.get("primitiveType", "").rpartition("_")[2]
        works = kind in _WORKERS or (dtype == "float32" and kind not in _EDGES)
        if works and given in _REAL and given != wanted:
            raise UnsupportedPrecisionError(
                f"asked for {dtype}, but OpenVINO {ov.__version__} computes {kind} in {given}, for this graph on this "
                "machine. Ask for dtype='auto', the artefact's own type, or export the model in another"
            )


def executed(compiled: Any) -> list[dict[str, str]]:
    """List the layers of a compiled graph as OpenVINO runs them, with what it says of each."""
    said = ("layerType", "runtimePrecision", "primitiveType")
    nodes = (node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops())
    return [{key: info[key].astype(str) for key in said if key in info} for info in nodes]
