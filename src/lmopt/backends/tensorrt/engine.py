"""Open an exported decoder as a TensorRT engine: compile it, or find it compiled, and load it onto a GPU."""

import os
from pathlib import Path

from lmopt.accelerators import CudaDevice, cuda, require_cuda
from lmopt.backends.tensorrt import engine_cache, flavour
from lmopt.backends.tensorrt.building import BuildOptions, Plan
from lmopt.backends.tensorrt.device_engine import TensorRTEngine
from lmopt.backends.tensorrt.loading import Loaded
from lmopt.backends.tensorrt.spec import BACKEND
from lmopt.contracts import EngineRequest
from lmopt.errors import ArtifactNotFoundError, UnsupportedError, UnsupportedOptionError


def open_engine(request: EngineRequest) -> TensorRTEngine:
    """Open the `onnx` format of an artefact; see `lmopt.contracts.EngineFactory`.

    Options, beside those of `BuildOptions`:

    - `cuda_graphs` (default `True`): capture decode steps and replay them.
    - `engine`: path of a plan that somebody else compiled, in place of compiling; only with `trust_engine=True`,
      as a plan is native code that runs with this process's rights.
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
    device = require_cuda(request.device)
    # Loaded late: without the driver that was just found, importing it may fail and using it may crash.
    from lmopt.backends.tensorrt.cuda import use_device

    use_device(device.index)
    if path is not None:
        plan = engine_cache.open_plan(Path(path), trust_engine=trust, options=options)
    else:
        plan = engine_cache.plan_for(request.artifact, options, facts=request.facts, device=key_of(device))
    _check_type(plan, request.dtype)
    loaded = Loaded(plan, flavour.load(plan.flavour), cuda_graphs=graphs)
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


def _check_type(plan: Plan, dtype: str) -> None:
    if dtype not in {"auto", plan.compute_type}:
        raise UnsupportedError(
            f"the artefact computes in {plan.compute_type}; asked for {dtype}. Precision is chosen at export: "
            f"lmopt.Model.from_pretrained(..., dtype={dtype!r}), then export again"
        )


def _flag(options: dict[str, object], name: str, *, default: bool) -> bool:
    value = options.pop(name, default)
    if not isinstance(value, bool):
        raise UnsupportedOptionError(f"{name}={value!r} is not possible; expected True or False")
    return value
