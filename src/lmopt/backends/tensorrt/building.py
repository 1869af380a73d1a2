"""Compile an exported graph into a TensorRT plan."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from lmopt.backends.tensorrt import best, precision
from lmopt.backends.tensorrt.flavour import AUTO, MODULES, Flavour, load
from lmopt.backends.tensorrt.network import Network
from lmopt.backends.tensorrt.preparing import Prepared, prepare
from lmopt.backends.tensorrt.profiles import Profile, add_profiles, default_profiles
from lmopt.errors import EngineBuildError, UnsupportedError, UnsupportedOptionError
from lmopt.types import ModelFacts, TensorSpec

COMPATIBILITY: Final = ("none", "ampere_plus", "same_compute_capability")
LEVELS: Final = range(6)
_WORDS: Final = 5


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What may be chosen about a build. Precision may not: it is in the graph.

    Attributes:
        flavour: `"auto"`, `"tensorrt"` or `"tensorrt_rtx"`.
        compute_capabilities: Targets such as `("8.6", "8.9")`, for RTX only. Empty: the GPU that will run it, and
            without one all that RTX builds for by default (Ampere and later).
        workspace_bytes: Limit of scratch memory on the GPU; `None` leaves it to TensorRT.
        optimization_level: How long to search for kernels, 0 to 5; `None`: TensorRT's own, 3.
        hardware_compatibility: `"none"`, `"ampere_plus"` or `"same_compute_capability"`, for the standard flavour.
        timing_cache: Whether kernel timings are kept between builds (standard flavour; RTX times nothing).
        tf32: Whether products of float32 may be rounded to TF32. Off unless asked for.
        best_logits: How many of a row's largest logits are found on the device: greedy decoding, and sampling with
            `top_k` below it, then bring only these to the host. 0 leaves that out; at most 3840.
        max_batch: Most rows of a call, for the default profiles.
        max_sequence: Most new tokens of a call, likewise; longer prompts are read in pieces.
        max_past: Most slots of the past, likewise; `None`: the model's context, at most 4096.
        max_source: Most positions of an encoder-decoder's source, likewise; `None`: what it takes, at most 512.
        profiles: Profiles in place of the default ones.

    Raises:
        UnsupportedOptionError: A value is impossible; the possible ones are named.
    """

    flavour: str = AUTO
    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    hardware_compatibility: str = "none"
    timing_cache: bool = True
    tf32: bool = False
    best_logits: int = 64
    max_batch: int = 4
    max_sequence: int = 512
    max_past: int | None = None
    max_source: int | None = None
    profiles: tuple[Profile, ...] = ()

    def __post_init__(self) -> None:
        """Check every field that a build would stumble over late."""
        if self.flavour not in {AUTO, *MODULES}:
            raise _impossible("flavour", self.flavour, f"{AUTO}, {', '.join(MODULES)}")
        if self.hardware_compatibility not in COMPATIBILITY:
            raise _impossible("hardware_compatibility", self.hardware_compatibility, ", ".join(COMPATIBILITY))
        if self.optimization_level is not None and self.optimization_level not in LEVELS:
            raise _impossible("optimization_level", self.optimization_level, "0 to 5")
        if self.workspace_bytes is not None and (
            type(self.workspace_bytes) is not int or self.workspace_bytes < 1
        ):
            raise _impossible("workspace_bytes", self.workspace_bytes, "a whole number of bytes, at least 1")
        if type(self.best_logits) is not int or not 0 <= self.best_logits <= best.MOST:
            raise _impossible("best_logits", self.best_logits, f"a whole number from 0 to {best.MOST}")
        for name in ("timing_cache", "tf32"):
            if not isinstance(getattr(self, name), bool):
                raise _impossible(name, getattr(self, name), "True or False")
        given: Any = self.compute_capabilities  # one target may come as a text, several as a list
        targets = (given,) if isinstance(given, str) else tuple(given)
        if not all(isinstance(one, str) for one in targets) or len(set(targets)) < len(targets):
            raise _impossible("compute_capabilities", targets, 'different ones, such as ("8.6", "8.9")')
        object.__setattr__(self, "compute_capabilities", targets)
        object.__setattr__(self, "profiles", tuple(_as_profile(one) for one in self.profiles))

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> tuple["BuildOptions", dict[str, object]]:
        """Take the build options out of a backend's options; give what is left over as well.

        Raises:
            UnsupportedOptionError: A value is impossible.
        """
        own = {one.name for one in fields(cls)}
        taken: dict[str, Any] = {name: value for name, value in options.items() if name in own}
        rest = {name: value for name, value in options.items() if name not in own}
        return cls(**taken), rest

    def to_dict(self) -> dict[str, Any]:
        """Give all that a plan depends on as plain data; the flavour is told apart elsewhere."""
        return {
            **{
                name: value for name, value in asdict(self).items() if name not in {"flavour", "timing_cache"}
            },
            "compute_capabilities": sorted(self.compute_capabilities),
            "profiles": [one.to_dict() for one in self.profiles],
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled engine.

    Attributes:
        data: Native code, as TensorRT deserialises it. It runs with this process's rights: it is only handed out
            where this process made it, or this user's cache did, or the user has trusted it by name.
        flavour: `"tensorrt"` or `"tensorrt_rtx"`.
        version: Version of TensorRT; no other one loads it.
        inputs: Inputs with dtype and symbolic axes, as in the artefact.
        outputs: Outputs, likewise.
        profiles: In the engine's order.
        compute_type: Type of most of its products.
        targets: Compute capabilities that it was built for; empty where TensorRT chose.
        types: How many values of the network have each type.
        log: What the builder warned of.
        seconds: How long preparing, parsing and building took; 0 for one out of the cache.
        from_cache: Whether it comes out of the cache.
        timings: Kernel timings to be kept for later builds; empty with RTX.
    """

    data: bytes = field(repr=False)
    flavour: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    compute_type: str
    targets: tuple[str, ...] = ()
    types: Mapping[str, int] = field(default_factory=dict)
    log: tuple[str, ...] = ()
    seconds: float = 0.0
    from_cache: bool = False
    timings: bytes = field(default=b"", repr=False)


def build_plan(model: Path, options: BuildOptions, *, facts: ModelFacts, timings: bytes = b"") -> Plan:
    """Prepare, parse, check and compile a graph of the portable dialect.

    With RTX this needs no GPU; the standard flavour times kernels on the GPU that is current.

    Args:
        model: The `.onnx` file; external data beside it.
        options: See `BuildOptions`.
        facts: Facts of the model, for the default profiles.
        timings: Timing cache of an earlier build, of this user's own; for the standard flavour.

    Raises:
        UnsupportedPrecisionError: A target does not compute in a type of the graph.
        UnsupportedError: The graph has operators that are not the standard's, or an option is the other flavour's.
        EngineBuildError: TensorRT refuses the graph, cannot compile it, or has changed its types.
    """
    began = time.perf_counter()
    with open_network(model, options.flavour, best_logits=options.best_logits) as (network, prepared):
        plan = compile_network(network, prepared, options, facts=facts, timings=timings)
    return replace(plan, seconds=time.perf_counter() - began)


@contextmanager
def open_network(
    model: Path, flavour: str = AUTO, *, best_logits: int = 0
) -> Iterator[tuple[Network, Prepared]]:
    """Prepare and parse a graph; while the block runs it may be compiled several times, for different targets.

    Args:
        model: As for `build_plan`.
        flavour: As in `BuildOptions`.
        best_logits: Likewise.

    Raises:
        UnsupportedPrecisionError, UnsupportedError, EngineBuildError: As for `build_plan`.
    """
    found = load(flavour)
    with tempfile.TemporaryDirectory(prefix="lmopt-tensorrt-") as folder:
        prepared = prepare(model, Path(folder), best=best_logits)
        with Network(found) as network:
            yield network.parse(prepared.path), prepared


def check_network(network: Network, prepared: Prepared, options: BuildOptions) -> dict[str, int]:
    """Refuse what the targets cannot compute; give the network's types.

    Raises:
        UnsupportedPrecisionError, UnsupportedError, EngineBuildError: As for `build_plan`.
    """
    _check_flavour(network.flavour, options)
    precision.require(precision.types_in_use(network), options.compute_capabilities)
    return precision.require_met(network, prepared)


def compile_network(
    network: Network, prepared: Prepared, options: BuildOptions, *, facts: ModelFacts, timings: bytes = b""
) -> Plan:
    """Check and compile a network; arguments and errors as for `build_plan`."""
    began = time.perf_counter()
    types = check_network(network, prepared, options)
    profiles = options.profiles or default_profiles(
        prepared.inputs,
        facts,
        max_batch=options.max_batch,
        max_sequence=options.max_sequence,
        max_past=options.max_past,
        max_source=options.max_source,
    )
    config = _config(network, options)
    add_profiles(network.builder, config, prepared.inputs, tuple(network.inputs()), profiles)
    flavour = network.flavour
    cache = None
    if flavour.has_timing_cache and options.timing_cache:
        cache = config.create_timing_cache(timings)
        config.set_timing_cache(cache, False)
    network.log.clear()
    data = network.builder.build_serialized_network(network.native, config)
    if data is None:
        words = "; ".join(network.log.errors()[-_WORDS:]) or "TensorRT gives no reason"
        targets = ", ".join(options.compute_capabilities)
        what = f"{prepared.path.name}{f' for compute capability {targets}' if targets else ''}"
        raise EngineBuildError(f"{flavour.name} {flavour.version} cannot compile {what}: {words}")
    return Plan(
        data=bytes(data),
        flavour=flavour.name,
        version=flavour.version,
        inputs=prepared.inputs,
        outputs=prepared.outputs,
        profiles=profiles,
        compute_type=precision.compute_type(network),
        targets=options.compute_capabilities,
        types=types,
        log=network.log.warnings(),
        seconds=time.perf_counter() - began,
        timings=b"" if cache is None else bytes(cache.serialize()),
    )


def _config(network: Network, options: BuildOptions) -> Any:
    trt = network.flavour.module
    config = network.builder.create_builder_config()
    # Verbose enough for an inspector to show each layer's types; costs a little of the plan's size.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility.upper())
        config.hardware_compatibility_level = level
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for place, target in enumerate(options.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, _enum_name(target)), place)
    return config


def _check_flavour(flavour: Flavour, options: BuildOptions) -> None:
    """Refuse options that only the other flavour has, and targets that this one cannot name."""
    if flavour.has_targets:
        if options.hardware_compatibility != "none":
            raise UnsupportedError(
                f"hardware_compatibility={options.hardware_compatibility!r} is of the flavour tensorrt; "
                f"{flavour.name} takes compute_capabilities, such as ('8.6', '8.9')"
            )
        if unknown := [one for one in options.compute_capabilities if one not in flavour.targets]:
            raise UnsupportedError(
                f"{flavour.name} {flavour.version} does not build for compute capability {', '.join(unknown)}; it "
                f"builds for {', '.join(flavour.targets)}. Data-centre GPUs are served by the flavour tensorrt"
            )
    elif options.compute_capabilities:
        raise UnsupportedError(
            f"compute_capabilities={options.compute_capabilities!r} is of the flavour tensorrt_rtx; {flavour.name} "
            "builds for the GPU that it runs on. Leave the option out, or ask for flavour='tensorrt_rtx'"
        )


def _enum_name(target: str) -> str:
    return "SM" + target.replace(".", "")


def _as_profile(given: Any) -> Profile:
    """Make a profile of one, or of its fields in a dictionary, which is what JSON has."""
    if isinstance(given, Profile):
        return given
    try:
        return Profile(**given)
    except TypeError as error:
        raise _impossible("profiles", given, "profiles with name, batch, sequence and past") from error


def _impossible(name: str, value: object, expected: str) -> UnsupportedOptionError:
    return UnsupportedOptionError(f"{name}={value!r} is not possible; expected {expected}")
