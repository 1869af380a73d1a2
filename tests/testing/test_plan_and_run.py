"""Which checks run on which cases, and what the runner says of them."""

import os
import subprocess
import sys
import unittest
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lmopt.errors import ConformanceError, UnknownPluginError, UnsupportedOptionError
from lmopt.registry import backends
from lmopt.spec import BackendSpec
from lmopt.testing import ENGINE_CHECKS, SPEC_CHECKS, check_backend, parametrize_backend_checks
from lmopt.testing import workshop as workshop_module
from lmopt.testing.__main__ import main
from lmopt.testing.plan import PlannedCheck, plan
from lmopt.testing.run import ConformanceReport, run_check
from lmopt.testing.workshop import Workshop, kept, reference_of


def failing() -> None:
    raise ConformanceError("a rule is broken")


def passing() -> None:
    pass


def skipping() -> None:
    raise unittest.SkipTest("does not apply")


@pytest.mark.parametrize(
    ("action", "expected", "verdict", "ok"),
    [
        (passing, "", "passed", True),
        (failing, "", "failed", False),
        (skipping, "", "not run", True),
        (failing, "known", "failed as expected", True),
        (passing, "known", "passed unexpectedly", False),
        (skipping, "known", "not run", True),
    ],
)
def test_verdicts(action: object, expected: str, verdict: str, ok: bool) -> None:
    outcome = run_check(PlannedCheck("some_rule", "some-case", "A rule.", action, expected))
    assert (outcome.verdict, outcome.ok) == (verdict, ok)


def test_the_table_names_every_case_that_did_not_pass() -> None:
    checks = [
        PlannedCheck("good_rule", "case-a", "", passing),
        PlannedCheck("bad_rule", "case-a", "", failing),
        PlannedCheck("bad_rule", "case-b", "", passing),
    ]
    report = ConformanceReport("toy", tuple(map(run_check, checks)))
    table = str(report)
    assert not report.ok
    assert "case-a: failed: ConformanceError: a rule is broken" in table
    assert "total: 2 passed, 1 failed" in table


def test_a_declared_format_gives_one_case_a_model_dialect_and_type(fake: ModuleType) -> None:
    planned = plan("onnxruntime", models=("llama", "lstm"), devices=("cpu",))
    cases = {check.case for check in planned} - {"spec"}
    assert cases == {
        "llama-onnx-cpu-float32",
        "llama-onnx-cpu-float16",
        "llama-onnx-onnxruntime-cpu-float32",
        "llama-onnx-onnxruntime-cpu-float16",
        "lstm-onnx-cpu-float32",
        "lstm-onnx-cpu-float16",
        "lstm-onnx-onnxruntime-cpu-float32",
        "lstm-onnx-onnxruntime-cpu-float16",
    }
    assert len(planned) == len(SPEC_CHECKS) + 8 * len(ENGINE_CHECKS)
    assert len({check.id for check in planned}) == len(planned)


@pytest.mark.parametrize(
    ("dialects", "cases"),
    [
        (("portable",), {"llama-onnx-cpu-float32"}),
        (("onnxruntime",), {"llama-onnx-onnxruntime-cpu-float32"}),
        (None, {"llama-onnx-cpu-float32", "llama-onnx-onnxruntime-cpu-float32"}),
    ],
)
def test_dialects_that_are_named_are_the_only_ones(dialects: tuple[str, ...] | None, cases: set[str]) -> None:
    planned = plan("onnxruntime", models=("llama",), devices=("cpu",), dialects=dialects)
    assert {check.case for check in planned if check.case.endswith("float32")} == cases


def test_tests_of_one_process_share_what_is_exported() -> None:
    assert kept() is kept()
    first, second = (kept().subject("lstm", "module", "float32") for _ in range(2))
    assert first is second


def test_processes_of_one_session_share_what_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ("lstm", "safetensors", "float32")
    with Workshop() as first, Workshop() as second:
        first.share(tmp_path / "kit")
        one = first.subject(*key)
        monkeypatch.setattr(
            workshop_module, "export", None
        )  # what another process has written is not written again
        second.share(tmp_path / "kit")
        other = second.subject(*key)
        assert one.artifact is not None
        assert other.artifact is not None
        assert one.artifact.path == other.artifact.path == tmp_path / "kit" / "lstm-safetensors-float32"
        ids = np.array([1, 2, 3])
        np.testing.assert_array_equal(one.reference(ids), other.reference(ids))
    assert (tmp_path / "kit").is_dir()


def test_a_backend_is_looked_up_once_a_case(fake: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []
    spec = backends.spec

    def count(name: str) -> BackendSpec:
        looked_up.append(name)
        return spec(name)

    monkeypatch.setattr(backends, "spec", count)
    with Workshop() as workshop:
        make = workshop.case("torch", "lstm", "module", "cpu", "float32")
        make().open().close()
        assert looked_up
        looked_up.clear()
        make().open().close()
    assert not looked_up


def test_the_reference_leaves_torchs_threads_alone() -> None:
    import torch

    seen = []

    class Watched(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
            seen.append(torch.get_num_threads())
            return (ids[..., None].float(),)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        reference_of(Watched())(np.array([1, 2]))
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)


def test_a_format_that_nobody_writes_is_listed_and_not_run(fake: ModuleType) -> None:
    (listed,) = (check for check in plan("fake") if check.name == "format")
    outcome = run_check(listed)
    assert outcome.verdict == "not run"
    assert "no installed exporter writes the format 'fake'" in outcome.note


def test_check_backend_gives_a_report(fake: ModuleType) -> None:
    report = check_backend("fake")
    assert report.ok
    assert "spec_is_light" in str(report)


def test_an_expected_failure_that_passes_is_a_failure(fake: ModuleType) -> None:
    with pytest.raises(ConformanceError, match="passed unexpectedly: expected to fail: not done yet"):
        check_backend("fake", expected_failures={"spec_is_light": "not done yet"})


@pytest.mark.parametrize(
    ("key", "hits"),
    [
        ("join_appends_rows", 4),
        ("join_appends_rows[llama-onnx-cpu-float32]", 1),
        ("*[lstm-*]", 2 * len(ENGINE_CHECKS)),
        ("join_*", 4),
        ("*", len(SPEC_CHECKS) + 4 * len(ENGINE_CHECKS)),
    ],
)
def test_expected_failures_are_named_by_check_id_or_pattern(key: str, hits: int) -> None:
    wanted = {"models": ("llama", "lstm"), "devices": ("cpu",)}
    planned = plan("onnxruntime", **wanted, expected_failures={key: "why"})
    planned = [check for check in planned if not check.case.endswith("float16")]
    assert sum(check.expected_failure == "why" for check in planned) == hits


def test_an_expected_failure_that_fits_no_check_is_refused(fake: ModuleType) -> None:
    with pytest.raises(UnsupportedOptionError, match="spec_is_lihgt"):
        check_backend("fake", expected_failures={"spec_is_lihgt": "a typing error"})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="mamba"):
        plan("torch", models=("mamba",))
    with pytest.raises(UnsupportedOptionError, match=r"'portabel'; there are \['onnxruntime', 'portable'\]"):
        plan("onnxruntime", dialects=("portabel",))
    with pytest.raises(UnknownPluginError, match="Did you mean 'torch'"):
        plan("toorch")


def test_the_decorator_makes_strict_expected_failures(fake: ModuleType) -> None:
    mark = parametrize_backend_checks("fake", expected_failures={"spec_is_light": "why"}).mark
    parameters = {parameter.id: parameter for parameter in mark.args[1]}
    (xfail,) = parameters["spec_is_light[spec]"].marks
    assert xfail.name == "xfail"
    assert xfail.kwargs == {"reason": "why", "strict": True}
    assert not parameters["spec_is_coherent[spec]"].marks


def test_under_pytest_an_expected_failure_that_passes_fails(fake: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "from lmopt.testing import parametrize_backend_checks\n\n\n"
        "@parametrize_backend_checks('fake', expected_failures={'spec_is_light': 'why'})\n"
        "def test_contract(check):\n    check()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:randomly", "-c", os.devnull, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 1, done.stdout
    assert "XPASS(strict)" in done.stdout
    assert "1 failed, 2 passed, 1 skipped" in done.stdout


def test_the_command_prints_the_table(fake: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake"]) == 0
    assert "Conformance of backend 'fake'" in capsys.readouterr().out
    assert main(["no-such-backend"]) == 1
    assert "no backend is named" in capsys.readouterr().err
    assert main([]) == 2


SPECS = {
    "imports a framework": ("spec_is_light", "import onnx.helper\n", {}),
    "imports what it requires": ("spec_is_light", "import lmopt_fake_needs\n", {}),
    "another name": ("spec_is_coherent", "", {"name": "'Fake'"}),
    "engine without attribute": ("spec_is_coherent", "", {"engine": "'lmopt_fake.engine'"}),
    "unknown type": ("spec_is_coherent", "", {"can": "Capabilities(('fake',), dtypes=('fp32',))"}),
    "indexed device": ("spec_is_coherent", "", {"can": "Capabilities(('fake',), devices=('cuda:0',))"}),
    "no format": ("spec_is_coherent", "", {"can": "Capabilities(())"}),
    "a list": ("spec_is_coherent", "", {"can": "Capabilities(['fake'])"}),
    "unknown feature": (
        "spec_is_coherent",
        "",
        {"can": "Capabilities(('fake',), features=frozenset({'telepathy'}))"},
    ),
}


@pytest.mark.parametrize("what", SPECS)
def test_a_broken_spec_is_caught(
    what: str, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, first_line, changes = SPECS[what]
    fields = {
        "name": "'fake'",
        "engine": "'lmopt_fake.engine:open_engine'",
        "can": "Capabilities(('fake',))",
        "requires": "(Requirement('lmopt_fake_needs', 'lmopt-fake[needs]'),)",
        **changes,
    }
    arguments = ", ".join(f"{name}={value}" for name, value in fields.items())
    (tmp_path / "site" / "lmopt_bad_spec.py").write_text(
        f"{first_line}from lmopt.spec import BackendSpec, Capabilities, Requirement\n"
        f"BACKEND = BackendSpec({arguments})\n"
    )
    entry = next((tmp_path / "site").glob("*.dist-info")) / "entry_points.txt"
    entry.write_text("[lmopt.backends]\nfake = lmopt_bad_spec:BACKEND\n")
    monkeypatch.delitem(sys.modules, "lmopt_bad_spec", raising=False)
    checks = {one.__name__: one for one in SPEC_CHECKS}
    with pytest.raises(ConformanceError):
        checks[f"check_{check}"]("fake")
    monkeypatch.delitem(sys.modules, "lmopt_bad_spec", raising=False)
