"""Open an exported decoder on OpenVINO, with the engine that its state is right for."""

from lmopt.contracts import EngineRequest
from lmopt_openvino.arrays import ArrayEngine
from lmopt_openvino.cached import CachedEngine
from lmopt_openvino.graph import Graph
from lmopt_openvino.spec import BACKEND


def open_engine(request: EngineRequest) -> "ArrayEngine | CachedEngine":
    """Open the `onnx` format of an artefact; see `lmopt.contracts.EngineFactory`.

    Nothing that OpenVINO does by default to be fast at the cost of other numbers is left on: `dtype="auto"` computes
    in the artefact's own type, float32 for most. Options by which more may be asked for:

    * `dynamic_quantization_group_size` (0): round activations to 8 bits, so many to a scale, on the way into
      products with quantized weights;
    * `pinning` (`False`): bind each thread to a CPU. OpenVINO's own default is `True`, which makes two processes
      share one CPU.
    """
    BACKEND.require(device=request.device, dtype=request.dtype)
    graph = Graph(request)
    return (CachedEngine if graph.fused else ArrayEngine)(graph, request.facts)
