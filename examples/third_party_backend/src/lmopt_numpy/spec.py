"""The backend as lmopt sees it before NumPy or onnx is imported."""

from lmopt.spec import BackendSpec, Capabilities, Requirement

BACKEND = BackendSpec(
    name="numpy",
    engine="lmopt_numpy.engine:open_engine",
    can=Capabilities(
        formats=("onnx",),
        devices=("cpu",),
        dtypes=("float32",),
        features=frozenset({"taps"}),
    ),
    requires=(Requirement(module="onnx", install="lmopt-numpy"),),
    description="Pure NumPy: slow, short, and easy to read; runs exported graphs without onnxruntime",
)
