"""Open an exported decoder as a TensorRT engine: compile it, or find it compiled, and load it onto a GPU."""

import os
import warnings
from pathlib import Path
from typing import Any

from lmopt.accelerators import CudaDevice, cuda, require_cuda
from lmopt.backends.tensorrt import engine_cache, flavour
from lmopt.backends.tensorrt.building import BuildOptions, Plan
from lmopt.backends.tensorrt.device_engine import TensorRTEngine
from lmopt.backends.tensorrt.loading import Loaded
from lmopt.backends.tensorrt.spec import BACKEND
from lmopt.contracts import EngineRequest
from lmopt.errors import ArtifactNotFoundError, EngineError, UnsupportedError, UnsupportedOptionError


def open_engine(request: EngineRequest) -> TensorRTEngine:
    """Open the `onnx` format of an artefact; see `lmopt.contracts.EngineFactory`.

    Options, beside those of `BuildOptions`:

    - `cuda_graphs` (default `True`): capture decode steps and replay them.
    - `engine`: path of a plan that somebody else compiled, in place of compiling; only with `trust_engine=True`,
      as a plan is native code that runs with this process's rights.

    A plan out of the cache that TensorRT refuses is built again, once and with one warning.
    """
    BACKEND.require(device=request.device, dtype=request.dtype)
    options, rest = BuildOptions.from_options(request.options)
    graphs = _flag(rest, "cuda_graphs", default=True)
    trust = _flag(rest, "trust_engine", default=False)
    path = rest.pop("engine", None)
    if rest:
        raise UnsupportedOptionError(
            f"backend 'tensorrt' has no option {sorted(rest)[0]!r}; it has cuda_graphs, engine, trust_engine, and "
            f"{', '.join(BuildOptions.__dataclass_fields__)}, beside device and dtype"
        )
    if path is not None and not isinstance(path, str | os.PathLike):
        raise UnsupportedOptionError(f"engine={path!r} is not possible; expected a path")
    if request.threads is not None:
        raise UnsupportedOptionError(
            f"threads={request.threads} has no meaning for backend 'tensorrt', whose work is done by the GPU"
        )
    if request.artifact is None:
        raise ArtifactNotFoundError(
            "backend 'tensorrt' compiles exported artefacts; export the model first with "
            "lmopt.Exporter('onnx').export(model, folder), or give the model to lmopt.Runtime, which does it"
        )
    # Told by the manifest, so that nobody waits for a compiler to learn it.
    stated = request.artifact.manifest["formats"].get("onnx", {}).get("dtype", request.dtype)
    _check_type(stated, request.dtype)
    device = require_cuda(request.device)
    # Loaded late: without the driver that was just found, importing it may fail and using it may crash.
    from lmopt.backends.tensorrt.cuda import use_device

    use_device(device.index)
    if path is None:
        loaded = _compiled(request, options, device, graphs)
    else:
        plan = engine_cache.open_plan(Path(path), trust_engine=trust, options=options)
        loaded = _load(plan, request, graphs)
    return TensorRTEngine(loaded, request.facts, device, cuda_graphs=graphs)


def key_of(device: CudaDevice) -> dict[str, object]:
    """What a plan depends on of the GPU that it is compiled for."""
    state = cuda()
    return {
        "name": device.name,
        "compute_capability": device.compute_capability,
        "multiprocessors": device.multiprocessors,
        "memory_bytes": device.memory_bytes,
        "driver": state.driver,
        "runtime": state.runtime,
    }


def _compiled(request: EngineRequest, options: BuildOptions, device: CudaDevice, graphs: bool) -> Loaded:
    """Load the artefact's plan; where TensorRT refuses one out of the cache, build it again, once."""
    assert request.artifact is not None
    how: dict[str, Any] = {"facts": request.facts, "device": key_of(device)}
    plan = engine_cache.plan_for(request.artifact, options, **how)
    try:
        return _load(plan, request, graphs)
    except EngineError as error:
        if not plan.from_cache:
            raise
        warnings.warn(f"{engine_cache.BUILT_AGAIN}: {error}", RuntimeWarning, stacklevel=3)
    return _load(engine_cache.plan_for(request.artifact, options, **how, again=True), request, graphs)


def _load(plan: Plan, request: EngineRequest, graphs: bool) -> Loaded:
    _check_type(plan.compute_type, request.dtype)
    return Loaded(plan, flavour.load(plan.flavour), cuda_graphs=graphs)


def _check_type(computes: str, dtype: str) -> None:
    if dtype not in {"auto", computes}:
        raise UnsupportedError(
            f"the artefact computes in {computes}; asked for {dtype}. Precision is chosen at export: "
            f"lmopt.Model.from_pretrained(..., dtype={dtype!r}), then export again"
        )


def _flag(options: dict[str, object], name: str, *, default: bool) -> bool:
    value = options.pop(name, default)
    if not isinstance(value, bool):
        raise UnsupportedOptionError(f"{name}={value!r} is not possible; expected True or False")
    return value
