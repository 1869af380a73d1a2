"""The backend as lmopt sees it before OpenVINO is imported."""

from lmopt.spec import BackendSpec, Capabilities, Requirement

BACKEND = BackendSpec(
    name="openvino",
    engine="lmopt_openvino.engine:open_engine",
    can=Capabilities(
        formats=("onnx",),
        devices=("cpu",),
        dtypes=("float32", "bfloat16"),
        features=frozenset({"taps", "threads"}),
    ),
    requires=(Requirement(module="openvino", install="lmopt-openvino"),),
    description="OpenVINO: exported graphs on x86 and Arm CPUs; float32 unless bfloat16 is asked for by name",
)
