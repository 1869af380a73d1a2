"""PyTorch, and the exporters that start from it, as lmopt sees them before torch is imported."""

from lmopt.spec import BackendSpec, Capabilities, ExporterSpec, Requirement

_TORCH = Requirement(module="torch", install="lmopt[torch]")
_ONNX = (
    Requirement(module="onnx", install="lmopt[onnx]"),
    Requirement(module="onnx_ir", install="lmopt[onnx]"),
    Requirement(module="onnxscript", install="lmopt[onnx]"),
)

BACKEND = BackendSpec(
    name="torch",
    engine="lmopt.backends.torch.engine:open_engine",
    can=Capabilities(
        formats=("module", "torch.export"),
        devices=("cpu", "cuda"),
        dtypes=("float32", "bfloat16", "float16"),
        features=frozenset({"encoder", "taps", "threads", "trust"}),
    ),
    requires=(_TORCH,),
    description="PyTorch eager: runs any model as it is, on CPU and CUDA",
)

ONNX = ExporterSpec(
    name="onnx",
    export="lmopt.backends.torch.export_onnx:export_onnx",
    format="onnx",
    targets=("portable", "onnxruntime"),
    verify_with="onnxruntime",
    verify_widened=("bfloat16",),
    requires=(_TORCH, *_ONNX),
    description="one ONNX graph with its cache in and out",
)

TORCH_EXPORT = ExporterSpec(
    name="torch.export",
    export="lmopt.backends.torch.export_program:export_pt2",
    format="torch.export",
    verify_with="torch",
    requires=(_TORCH,),
    description="a torch.export program (.pt2); reading one back needs an explicit trust grant",
)

SAFETENSORS = ExporterSpec(
    name="safetensors",
    export="lmopt.backends.torch.export_safetensors:export_safetensors",
    format="safetensors",
    requires=(_TORCH,),
    description="weights in the Hugging Face layout",
)
