"""Names that our source uses, against the live bindings: the RTX compiler, and the lean runtime of TensorRT 11.4.

An attribute that does not exist would fail on a GPU only, where these tests do not run; so the source is read
instead. A misspelt name must be found: that is the control.
"""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

import lmopt.backends.tensorrt

ROOM = Path(lmopt.backends.tensorrt.__file__).parent
# What the last name before a dot stands for, wherever it is used in the room.
MEANINGS = {
    "builder": ("Builder",),
    "config": ("IBuilderConfig", "IRuntimeConfig"),
    "_parser": ("OnnxParser",),
    "layer": ("ILayer", "IAttentionInputLayer"),
    "attention": ("IAttention",),
    "tensor": ("ITensor",),
    "error": ("ParserError",),
    "cache": ("ITimingCache",),
}
BUILD = ("building.py", "network.py", "precision.py", "profiles.py", "collecting.py", "flavour.py")
NATIVES = {"network.py": ("INetworkDefinition",), "profiles.py": ("IOptimizationProfile",)}
RUNTIME = {
    "_runtime": ("Runtime",),
    "_engine": ("ICudaEngine",),
    "engine": ("ICudaEngine",),
    "config": ("IRuntimeConfig",),
}
RUN = {"loading.py": RUNTIME, "contexts.py": {"_native": ("IExecutionContext",)}}
MODULES = ("trt", "module", "_module")
GONE = {
    "BuilderFlag": ("FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS"),
    "Builder": ("build_engine", "build_cuda_engine", "max_batch_size", "platform_has_fast_fp16"),
    "IBuilderConfig": ("max_workspace_size", "int8_calibrator"),
    "ICudaEngine": ("device_memory_size", "weight_streaming_budget", "num_bindings", "get_binding_name"),
    "IExecutionContext": ("execute_async", "execute_async_v2", "all_shape_inputs_specified"),
    "OnnxParser": ("supports_model",),
}
# Of RTX alone, and guarded by `hasattr` in the source.
RTX_ONLY = frozenset({"CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE", "cuda_graph_strategy"})


def uses(source: str, meanings: dict[str, tuple[str, ...]]) -> set[tuple[tuple[str, ...], str]]:
    """Find `name.attribute` for the names that mean something, and `trt.A.B` from the module on."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value
        name = (
            owner.attr
            if isinstance(owner, ast.Attribute)
            else owner.id
            if isinstance(owner, ast.Name)
            else ""
        )
        if name in meanings:
            found.add((meanings[name], node.attr))
        if name in MODULES:
            found.add((("",), node.attr))
        if isinstance(owner, ast.Attribute):
            above = owner.value
            root = (
                above.attr
                if isinstance(above, ast.Attribute)
                else above.id
                if isinstance(above, ast.Name)
                else ""
            )
            if root in MODULES and owner.attr[0].isupper():
                found.add(((owner.attr,), node.attr))
    return found


def lacking(source: str, meanings: dict[str, tuple[str, ...]], module: ModuleType) -> list[str]:
    """List what a source uses and a live module does not have."""
    missing = []
    for classes, attribute in sorted(uses(source, meanings)):
        owners = [module if one == "" else getattr(module, one, None) for one in classes]
        if not any(hasattr(one, attribute) for one in owners if one is not None):
            missing.append(f"{'|'.join(classes)}.{attribute}")
    return missing


@pytest.fixture(scope="module")
def rtx():
    return importlib.import_module("tensorrt_rtx_bindings")


@pytest.fixture(scope="module")
def lean(missing):
    try:
        return importlib.import_module("tensorrt_lean_bindings")
    except ImportError as error:
        missing(f"the lean runtime is not installed: {error}")


def meanings_of(name):
    native = {"native": NATIVES[name]} if name in NATIVES else {}
    return {**MEANINGS, **native}


@pytest.mark.parametrize("name", BUILD)
def test_every_name_of_the_build_half_is_in_the_live_compiler(name, rtx):
    source = (ROOM / name).read_text()
    assert lacking(source, meanings_of(name), rtx) == []


@pytest.mark.parametrize("name", RUN)
def test_every_name_of_the_run_half_is_in_the_live_rtx(name, rtx):
    assert lacking((ROOM / name).read_text(), RUN[name], rtx) == []


@pytest.mark.parametrize("name", RUN)
def test_every_name_of_the_run_half_is_in_the_runtime_of_tensorrt_11(name, lean):
    found = lacking((ROOM / name).read_text(), RUN[name], lean)
    assert [one for one in found if one.rpartition(".")[2] not in RTX_ONLY] == []


def test_the_walk_sees_what_the_source_uses():
    """A walk that finds nothing would pass everything."""
    seen = {
        attribute for name in BUILD for _, attribute in uses((ROOM / name).read_text(), meanings_of(name))
    }
    assert {
        "build_serialized_network", "create_network", "parse_from_file", "set_compute_capability", "set_shape",
        "add_optimization_profile", "TF32", "WORKSPACE", "create_timing_cache", "num_layers", "decomposable",
    } <= seen  # fmt: skip
    runs = {attribute for name in RUN for _, attribute in uses((ROOM / name).read_text(), RUN[name])}
    assert {"deserialize_cuda_engine", "execute_async_v3", "set_tensor_address", "USER_MANAGED"} <= runs


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("build_serialized_network", "build_serialised_network"),
        ("BuilderFlag.TF32", "BuilderFlag.TF23"),
        ("set_memory_pool_limit", "set_memory_pool_limits"),
    ],
)
def test_a_misspelt_name_is_found(right, wrong, rtx):
    source = (ROOM / "building.py").read_text()
    assert right in source
    assert lacking(source.replace(right, wrong), meanings_of("building.py"), rtx)


def test_removed_names_are_gone_and_our_source_has_none_of_them(rtx):
    sources = "\n".join(path.read_text() for path in ROOM.glob("*.py"))
    attributes = {node.attr for node in ast.walk(ast.parse(sources)) if isinstance(node, ast.Attribute)}
    for owner, names in GONE.items():
        for name in names:
            assert not hasattr(getattr(rtx, owner), name), f"{owner}.{name} is back"
            # `INT4` is also a type of ONNX; as a flag it is gone.
            assert f"{owner}.{name}" not in sources
            assert owner == "BuilderFlag" or name not in attributes


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        ("Builder", "build_serialized_network", ("network", "config")),
        ("Builder", "create_network", ("flags",)),
        ("OnnxParser", "parse_from_file", ("model",)),
        ("IOptimizationProfile", "set_shape", ("input", "min", "opt", "max")),
        ("IBuilderConfig", "set_memory_pool_limit", ("pool", "pool_size")),
        ("IBuilderConfig", "set_compute_capability", ("compute_capability", "index")),
    ],
)
def test_the_calls_that_matter_take_what_we_give(owner, name, words, rtx):
    said = getattr(getattr(rtx, owner), name).__doc__
    for word in words:
        assert f"{word}:" in said.splitlines()[0], said.splitlines()[0]
