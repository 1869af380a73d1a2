"""ONNX Runtime as lmopt sees it before anything heavy is imported."""

from lmopt.spec import BackendSpec, Capabilities, Requirement

BACKEND = BackendSpec(
    name="onnxruntime",
    engine="lmopt.backends.onnxruntime.engine:open_engine",
    can=Capabilities(
        formats=("onnx",),
        devices=("cpu", "cuda"),
        dtypes=("float32", "float16"),
        features=frozenset({"encoder", "taps", "threads"}),
    ),
    requires=(Requirement(module="onnxruntime", install="lmopt[onnxruntime]"),),
    description="ONNX Runtime: exported graphs on CPU and CUDA, without torch",
)
