"""Open an exported decoder on ONNX Runtime, with the engine that its graph is written for."""

from lmopt.backends.onnxruntime.encoder import Encoder
from lmopt.backends.onnxruntime.graph import Graph
from lmopt.backends.onnxruntime.growing_cache import GrowingCacheEngine
from lmopt.backends.onnxruntime.providers import check_options
from lmopt.backends.onnxruntime.session import SessionSettings
from lmopt.backends.onnxruntime.shared_cache import SharedCacheEngine
from lmopt.backends.onnxruntime.spec import BACKEND
from lmopt.contracts import EngineRequest
from lmopt.errors import ArtifactNotFoundError, UnsupportedError, UnsupportedOptionError
from lmopt.platform import usable_cpus


def open_engine(request: EngineRequest) -> GrowingCacheEngine | SharedCacheEngine:
    """Open the `onnx` format of an artefact; see `lmopt.contracts.EngineFactory`.

    Options: `spinning` (default `True`, for encoder-decoders `False`) lets threads that wait keep their CPU busy for a
    moment: a fifth faster in 4-bit decoding, and a CPU that is not there for others, such as the threads of an
    encoder's other graph; `deterministic` (default `False`) makes results
    independent of how tokens are split over calls, see `SharedCacheEngine`; `kv_cache_dtype` (default `"auto"`)
    `"int8"` refuses a graph whose keys and values are not in 8 bits: that is chosen at export. On a GPU, `provider`
    (default `"auto"`: CUDA) may be `"tensorrt"`, and `allow_tf32` (default `False`) lets float32 products be rounded.
    `widen` (default `False`) computes a bfloat16 graph in float32, with the same weights: nothing here multiplies
    in bfloat16.
    """
    BACKEND.require(device=request.device, dtype=request.dtype)
    if request.artifact is None:
        raise ArtifactNotFoundError(
            "backend 'onnxruntime' runs exported artefacts; export the model first with "
            "lmopt.Exporter('onnx').export(model, folder), or give the model to lmopt.Runtime, which does it"
        )
    record = request.artifact.manifest["formats"]["onnx"]
    has_encoder = "encoder" in record
    options = dict(request.options)
    # Threads of one graph that spin are in the way of the other's, and of what beams cost beside both.
    spinning = _flag(options, "spinning", default=not has_encoder)
    deterministic = _flag(options, "deterministic", default=False)
    widen = _flag(options, "widen", default=False)
    kv_cache_dtype = options.pop("kv_cache_dtype", "auto")
    allow_tf32 = _flag(options, "allow_tf32", default=False)
    provider = options.pop("provider", "auto")
    if options:
        raise UnsupportedOptionError(
            f"backend 'onnxruntime' has no option {sorted(options)[0]!r}; it has spinning, deterministic, "
            "kv_cache_dtype, provider, allow_tf32 and widen, beside device, dtype and threads"
        )
    if kv_cache_dtype not in ("auto", "int8"):
        raise UnsupportedOptionError(f"kv_cache_dtype is {kv_cache_dtype!r}; expected 'auto' or 'int8'")
    if request.threads is not None and request.threads < 1:
        raise UnsupportedOptionError(f"threads is {request.threads}; expected at least 1")
    target = record.get("target", "portable")
    own = target == "onnxruntime"
    shared = own and not has_encoder
    if own and request.device != "cpu":
        raise UnsupportedError(
            f"graphs of the dialect 'onnxruntime' run on the cpu so far; asked for {request.device}. "
            "Export the model with target='portable' for other devices"
        )
    if deterministic and not shared:
        raise UnsupportedOptionError(
            "deterministic=True is not for encoder-decoders so far; leave it out"
            if own
            else f"deterministic=True needs a graph of the dialect 'onnxruntime'; this one is {target!r}. "
            "Export the model with lmopt.Exporter('onnx', target='onnxruntime')"
        )
    if kv_cache_dtype == "int8" and record.get("kv_cache_dtype") != "int8":
        raise UnsupportedOptionError(
            "this artefact keeps keys and values in float; an 8-bit cache is chosen at export, in the dialect "
            "'onnxruntime': lmopt.Exporter('onnx', target='onnxruntime', kv_cache_dtype='int8'), or lmopt export "
            "MODEL OUT --target onnxruntime --option kv_cache_dtype=int8. In eager mode backend 'torch' has one too"
        )
    narrow = record.get("dtype") == "bfloat16"
    if narrow != widen:
        raise UnsupportedError(
            "the artefact computes in bfloat16, which backend 'onnxruntime' does not. Pass widen=True to compute in "
            "float32 with the same weights, or run it on backend 'tensorrt'"
            if narrow
            else f"widen=True is for artefacts in bfloat16; this one is in {record.get('dtype')}. Leave it out"
        )
    provider = check_options(
        request.device, provider, allow_tf32=allow_tf32, dtype=record.get("dtype", "float32")
    )
    settings = SessionSettings(
        request.device, request.threads or usable_cpus(), spinning, provider, allow_tf32
    )
    if has_encoder:
        graph = Graph(request, settings, record["decoder"], widened=widen)
        try:
            encoder = Encoder(request.artifact, settings, graph.signature, widened=widen)
        except BaseException:
            graph.close()
            raise
        return GrowingCacheEngine(graph, request.facts, encoder)
    graph = Graph(request, settings, widened=widen)
    if shared:
        return SharedCacheEngine(graph, request.facts, deterministic=deterministic)
    return GrowingCacheEngine(graph, request.facts)


def _flag(options: dict[str, object], name: str, *, default: bool) -> bool:
    value = options.pop(name, default)
    if not isinstance(value, bool):
        raise UnsupportedOptionError(f"{name}={value!r} is not possible; expected True or False")
    return value
