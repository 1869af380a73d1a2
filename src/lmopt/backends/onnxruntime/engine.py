"""Open an exported decoder on ONNX Runtime, with the engine that its graph is written for."""

from lmopt.backends.onnxruntime.graph import Graph
from lmopt.backends.onnxruntime.growing_cache import GrowingCacheEngine
from lmopt.backends.onnxruntime.session import SessionSettings
from lmopt.backends.onnxruntime.shared_cache import SharedCacheEngine
from lmopt.backends.onnxruntime.spec import BACKEND
from lmopt.contracts import EngineRequest
from lmopt.errors import ArtifactNotFoundError, UnsupportedError, UnsupportedOptionError
from lmopt.platform import usable_cpus


def open_engine(request: EngineRequest) -> GrowingCacheEngine | SharedCacheEngine:
    """Open the `onnx` format of an artefact; see `lmopt.contracts.EngineFactory`.

    Options: `spinning` (default `True`) lets threads that wait keep their CPU busy for a moment: a fifth faster in
    4-bit decoding, and a CPU that is not there for others; `deterministic` (default `False`) makes results
    independent of how tokens are split over calls, see `SharedCacheEngine`.
    """
    BACKEND.require(device=request.device, dtype=request.dtype)
    options = dict(request.options)
    spinning = _flag(options, "spinning", default=True)
    deterministic = _flag(options, "deterministic", default=False)
    if options:
        raise UnsupportedOptionError(
            f"backend 'onnxruntime' has no option {sorted(options)[0]!r}; it has spinning and deterministic, "
            "beside device, dtype and threads"
        )
    if request.artifact is None:
        raise ArtifactNotFoundError(
            "backend 'onnxruntime' runs exported artefacts; export the model first with "
            "lmopt.Exporter('onnx').export(model, folder), or give the model to lmopt.Runtime, which does it"
        )
    if request.threads is not None and request.threads < 1:
        raise UnsupportedOptionError(f"threads is {request.threads}; expected at least 1")
    target = request.artifact.manifest["formats"]["onnx"].get("target", "portable")
    shared = target == "onnxruntime"
    if shared and request.device != "cpu":
        raise UnsupportedError(
            f"graphs of the dialect 'onnxruntime' run on the cpu so far; asked for {request.device}. "
            "Export the model with target='portable' for other devices"
        )
    if deterministic and not shared:
        raise UnsupportedOptionError(
            f"deterministic=True needs a graph of the dialect 'onnxruntime'; this one is {target!r}. "
            "Export the model with lmopt.Exporter('onnx', target='onnxruntime')"
        )
    settings = SessionSettings(request.device, request.threads or usable_cpus(), spinning)
    graph = Graph(request, settings)
    if shared:
        return SharedCacheEngine(graph, request.facts, deterministic=deterministic)
    return GrowingCacheEngine(graph, request.facts)


def _flag(options: dict[str, object], name: str, *, default: bool) -> bool:
    value = options.pop(name, default)
    if not isinstance(value, bool):
        raise UnsupportedOptionError(f"{name}={value!r} is not possible; expected True or False")
    return value
