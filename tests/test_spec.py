"""Specs are plain data that answer questions without importing a plug-in."""

import dataclasses
import sys

import pytest

from lmopt.spec import API_VERSION, BackendSpec, Capabilities, ExporterSpec, Requirement, Support

SPEC = BackendSpec(
    "toy",
    "toy.engine:open_engine",
    Capabilities(formats=("onnx", "module"), devices=("cpu", "cuda"), dtypes=("float32", "float16")),
)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:17"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_what_is_declared_is_supported(device: str, dtype: str) -> None:
    assert SPEC.supports(formats=("onnx",), device=device, dtype=dtype) == Support(True)


def test_one_common_format_is_enough() -> None:
    assert SPEC.supports(formats=("gguf", "onnx"), device="cpu", dtype="auto").ok


@pytest.mark.parametrize(
    ("formats", "device", "dtype", "words"),
    [
        (("gguf",), "cpu", "auto", ("it reads onnx, module", "given: gguf")),
        ((), "cpu", "auto", ("given: none",)),
        (("onnx",), "tpu", "auto", ("it runs on cpu, cuda", "asked for: tpu")),
        (("onnx",), "cudax", "auto", ("asked for: cudax",)),
        (("onnx",), "cpu", "int4", ("it computes in float32, float16", "asked for: int4")),
    ],
)
def test_what_is_not_declared_is_refused_with_a_reason(
    formats: tuple[str, ...], device: str, dtype: str, words: tuple[str, ...]
) -> None:
    answer = SPEC.supports(formats=formats, device=device, dtype=dtype)
    assert not answer.ok
    assert len(answer.reasons) == 1
    for word in words:
        assert word in answer.reasons[0]


def test_every_reason_is_given_at_once() -> None:
    answer = SPEC.supports(formats=("gguf",), device="tpu", dtype="int4")
    assert len(answer.reasons) == 3


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.name = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPEC.can.formats = ()


def test_defaults_are_the_modest_ones() -> None:
    assert SPEC.api == API_VERSION
    assert SPEC.requires == ()
    can = Capabilities(formats=("onnx",))
    assert (can.devices, can.dtypes, can.features) == (("cpu",), ("float32",), frozenset())
    assert ExporterSpec("x", "a:b", "x").targets == ("portable",)


def test_a_requirement_is_checked_without_importing(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("site")
    (folder / "fake_requirement_bomb.py").write_text("raise RuntimeError('imported')")
    need = Requirement("fake_requirement_bomb", "bomb")
    assert not need.is_met()
    monkeypatch.syspath_prepend(str(folder))
    assert need.is_met()
    assert "fake_requirement_bomb" not in sys.modules


def test_a_module_that_is_blocked_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json", None)
    assert not Requirement("json", "json").is_met()


def test_a_requirement_is_met_by_what_serves_as_well() -> None:
    assert Requirement("no_such_module", "x", instead=("no_such_either", "json")).is_met()
    assert not Requirement("no_such_module", "x", instead=("no_such_either",)).is_met()
