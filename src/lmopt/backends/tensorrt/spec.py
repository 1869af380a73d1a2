"""TensorRT as lmopt sees it before anything heavy is imported."""

from lmopt.spec import BackendSpec, Capabilities, Requirement

BACKEND = BackendSpec(
    name="tensorrt",
    engine="lmopt.backends.tensorrt.engine:open_engine",
    can=Capabilities(
        formats=("onnx",),
        devices=("cuda",),
        dtypes=("float32", "float16", "bfloat16"),
    ),
    requires=(
        Requirement(
            module="tensorrt",
            install="lmopt[tensorrt-rtx]",
            instead=("tensorrt_rtx", "tensorrt_rtx_bindings"),
        ),
        Requirement(module="onnx_ir", install="lmopt[tensorrt-rtx]"),
        Requirement(module="cuda", install="lmopt[tensorrt-rtx]"),
    ),
    description="TensorRT and TensorRT for RTX: graphs compiled for NVIDIA GPUs, without torch",
)
