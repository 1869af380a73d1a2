"""Options of a build: each is checked, passed on, or refused by name; the log is kept."""

import sys
import threading
from types import SimpleNamespace

import pytest

from lmopt.backends.tensorrt import flavour
from lmopt.backends.tensorrt.building import BuildOptions, build_plan, compile_network, open_network
from lmopt.backends.tensorrt.collecting import MOST_MESSAGES, logger_for
from lmopt.backends.tensorrt.engine_cache import graph_of
from lmopt.backends.tensorrt.flavour import Flavour
from lmopt.errors import (
    BrokenPluginError,
    EngineBuildError,
    EngineError,
    NotInstalledError,
    UnsupportedError,
    UnsupportedOptionError,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flavour", "cuda"),
        ("compute_capabilities", ("8.9", "8.9")),
        ("compute_capabilities", (8.9,)),
        ("workspace_bytes", 0),
        ("workspace_bytes", 1.5),
        ("optimization_level", 6),
        ("hardware_compatibility", "turing"),
        ("timing_cache", 1),
        ("tf32", "no"),
        ("profiles", ({"rows": 1},)),
    ],
)
def test_impossible_values_are_refused_by_name(name, value):
    with pytest.raises(UnsupportedOptionError, match=name):
        BuildOptions(**{name: value})


def test_options_are_taken_out_of_a_backends_options():
    options, rest = BuildOptions.from_options(
        {"max_batch": 2, "cuda_graphs": False, "compute_capabilities": "8.6"}
    )
    assert options == BuildOptions(max_batch=2, compute_capabilities=("8.6",))
    assert rest == {"cuda_graphs": False}


def test_options_of_the_other_flavour_are_refused(exported):
    artifact = exported("lstm", "float32")

    def build(**options):
        return build_plan(graph_of(artifact), BuildOptions("tensorrt_rtx", **options), facts=artifact.facts)

    with pytest.raises(UnsupportedError, match="compute_capabilities"):
        build(hardware_compatibility="ampere_plus")
    with pytest.raises(UnsupportedError, match=r"does not build for compute capability 9\.0"):
        build(compute_capabilities=("9.0",))
    with open_network(graph_of(artifact)) as (network, prepared):
        standard = SimpleNamespace(name="tensorrt", version="11.4", has_targets=False, module=None)
        network.flavour, kept = standard, network.flavour
        with pytest.raises(UnsupportedError, match="flavour='tensorrt_rtx'"):
            compile_network(
                network, prepared, BuildOptions(compute_capabilities=("8.9",)), facts=artifact.facts
            )
        network.flavour = kept


def test_every_option_reaches_the_compiler(exported, monkeypatch):
    """Read back from the live configuration, not from a mock."""
    from lmopt.backends.tensorrt.building import _config

    options = BuildOptions(
        compute_capabilities=("8.6", "12.0"), workspace_bytes=1 << 27, optimization_level=1, tf32=True
    )
    with open_network(graph_of(exported("lstm", "float32"))) as (network, _):
        trt = network.flavour.module
        config, plain = _config(network, options), _config(network, BuildOptions())
        assert config.get_flag(trt.BuilderFlag.TF32)
        assert not plain.get_flag(trt.BuilderFlag.TF32)
        assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 27
        assert config.builder_optimization_level == 1
        targets = [config.get_compute_capability(place) for place in range(config.num_compute_capabilities)]
        assert targets == [trt.ComputeCapability.SM86, trt.ComputeCapability.SM120]


def test_the_default_targets_build_without_a_gpu(exported):
    artifact = exported("lstm", "float32")
    plan = build_plan(graph_of(artifact), BuildOptions("tensorrt_rtx"), facts=artifact.facts)
    assert plan.targets == ()
    assert plan.seconds > 0
    names = {"logits", "present_state.0", "present_state.1", "best.values", "best.ids"}
    assert {one.name for one in plan.outputs} == names
    assert issubclass(EngineBuildError, EngineError)


def test_the_log_keeps_what_was_said_from_any_thread():
    trt = flavour.load("tensorrt_rtx").module
    log = logger_for(trt)
    levels = (trt.ILogger.ERROR, trt.ILogger.WARNING, trt.ILogger.INFO)

    def talk():
        for number in range(50):
            for level in levels:
                log.native.log(level, f" {level} {number}\n")

    threads = [threading.Thread(target=talk) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(log.errors()) == len(log.warnings()) == 200
    assert all(text == text.strip() for text in log.errors())
    for number in range(MOST_MESSAGES + 5):
        log.native.log(trt.ILogger.INTERNAL_ERROR, str(number))
    assert log.errors()[-1] == str(MOST_MESSAGES + 4)
    assert len(log.errors()) == MOST_MESSAGES
    log.clear()
    assert log.errors() == log.warnings() == ()


def test_the_installed_flavour_is_found_with_its_full_version():
    found = flavour.load("tensorrt_rtx")
    assert found.version.count(".") == 3
    assert found.has_targets
    assert not found.has_timing_cache
    assert {"7.5", "8.9", "12.0"} <= set(found.targets)
    assert isinstance(flavour.load(), Flavour)
    status = {one.name: one for one in flavour.examine()}
    assert status["tensorrt_rtx"].problem == ""
    assert status.keys() == set(flavour.MODULES)


def test_a_library_that_is_missing_is_told_in_its_own_words(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvonnxparser.so.11: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(BrokenPluginError, match=r"libnvonnxparser\.so\.11"):
        flavour.load("tensorrt")
    # Another flavour that works is not hidden by it.
    assert flavour.load("auto").name == "tensorrt_rtx"
    assert "libnvonnxparser" in {one.name: one for one in flavour.examine()}["tensorrt"].problem


def test_a_flavour_that_is_not_there_is_told_with_its_pip_line(monkeypatch):
    monkeypatch.setattr(flavour, "_find", lambda name: False)
    with pytest.raises(NotInstalledError, match=r"pip install \"lmopt\[tensorrt-rtx\]\""):
        flavour.load()
    with pytest.raises(UnsupportedOptionError, match="expected auto"):
        flavour.load("rtx")
