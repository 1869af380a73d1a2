"""`doctor`: what is broken fails, what is merely absent does not, and each finding names its repair."""

import json
import sys
from pathlib import Path

import pytest

from lmopt.accelerators import Usable
from lmopt.cli import machine_check, packages_check, plugins_check
from lmopt.cli.finding import Finding


def fake_distribution(site: Path, name: str, version: str, **files: str) -> None:
    """Write the metadata of a distribution that is not there."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Path:
    """A folder of packages in front of the others."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path / "site"


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {one.name: one for one in findings}


def quiet(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def test_doctor_here(call) -> None:
    result = call("doctor", "--json")
    findings = {(one["area"], one["name"]): one for one in result.data["findings"]}
    assert findings["backends", "onnxruntime"]["state"] == "ok", findings["backends", "onnxruntime"]
    assert "onnxruntime " in findings["backends", "onnxruntime"]["text"]
    assert findings["machine", "processors"]["state"] == "ok"
    assert ("accelerators", "CUDA") in findings
    broken = [one for one in findings.values() if one["state"] == "broken"]
    assert (result.status == 1) == bool(broken)
    assert result.data["ok"] == (not broken)


def test_both_wheels_of_onnxruntime_fail(call, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmopt.cli.doctor.check_plugins", lambda tell: [])  # each in a process of its own
    fake_distribution(site, "onnxruntime-gpu", "1.31.1")
    fake_distribution(site, "onnxruntime", "1.32.0")
    result = call("doctor", "--json")
    assert result.status == 1
    (found,) = [
        one for one in result.data["findings"] if (one["area"], one["name"]) == ("packages", "onnxruntime")
    ]
    assert found["state"] == "broken"
    assert found["repair"] == (
        f"{sys.executable} -m pip uninstall -y onnxruntime onnxruntime-gpu && "
        f'{sys.executable} -m pip install "lmopt[onnxruntime-gpu]"'
    )
    shown = call("doctor")
    assert shown.status == 1
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in shown.stdout


def test_one_wheel_is_fine() -> None:
    assert not packages_check.check_onnxruntime({"onnxruntime": "1.32.0", "numpy": "2.0"})


@pytest.mark.parametrize(
    ("packages", "state", "word"),
    [
        ({}, "missing", "not installed"),
        ({"tensorrt-cu13": "11.4.0.106", "tensorrt-cu13-bindings": "11.4", "tensorrt-cu13-libs": "11.4"}, "ok", ""),
        ({"tensorrt-cu12": "10.16.1.11"}, "warning", "version 10"),
        ({"tensorrt-cu12": "10.16.1.11", "tensorrt-cu13": "11.4.0.106"}, "broken", "10 and 11 are mixed"),
        ({"tensorrt-cu13-bindings": "11.4.0.106"}, "broken", "without the libraries"),
    ],
)  # fmt: skip
def test_tensorrt_flavours(packages, state, word) -> None:
    found = by_name(packages_check.check_tensorrt(packages))["TensorRT"]
    assert found.state == state
    assert word in found.text


@pytest.mark.parametrize(
    ("libs", "bindings", "state"),
    [("1.7.1.116", "1.7.1.116", "ok"), ("1.7.1.116", "1.6.1.120", "broken"), ("1.7.1.116", None, "broken")],
)
def test_the_parts_of_tensorrt_rtx_must_fit(libs, bindings, state) -> None:
    packages = {"tensorrt-rtx-cu13-libs": libs, "tensorrt-rtx-cu13-bindings": bindings}
    packages = {name: version for name, version in packages.items() if version}
    found = by_name(packages_check.check_tensorrt(packages))
    assert found["TensorRT-RTX"].state == state
    assert found["TensorRT"].state == "missing"


def test_old_versions_are_a_warning() -> None:
    found = by_name(packages_check.check_floors({"jinja2": "3.1.5", "numpy": "9.0", "torch": "2.10.0+cpu"}))
    assert list(found) == ["jinja2"]
    assert found["jinja2"].state == "warning"
    assert 'pip install --upgrade "jinja2>=3.1.6"' in found["jinja2"].repair


def test_a_plug_in_that_kills_the_process_is_named(site: Path) -> None:
    site.mkdir()
    (site / "lmopt_killer.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n")
    (site / "lmopt_killer_spec.py").write_text(
        "from lmopt.spec import BackendSpec, Capabilities\n"
        "BACKEND = BackendSpec('killer', 'lmopt_killer:engine', Capabilities(('onnx',)))\n"
    )
    entry_points = "[lmopt.backends]\nkiller = lmopt_killer_spec:BACKEND\ngone = lmopt_no_such_module:SPEC\n"
    fake_distribution(site, "killer", "1.0", entry_points__txt=entry_points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        findings = plugins_check.check_plugins(quiet)
    found = {(one.area, one.name): one for one in findings}
    assert found["backends", "killer"].state == "broken"
    assert "SIGSEGV" in found["backends", "killer"].text
    assert found["backends", "gone"].state == "broken"
    # The dead one does not take those after it along.
    assert found["backends", "torch"].state == "ok"
    assert found["exporters", "onnx"].state == "ok"


def test_stale_metadata_of_an_editable_install(site: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[project]\nname = "stale"\n[project.entry-points."lmopt.backends"]\nnew = "stale.spec:NEW"\n'
    )
    about = {"url": project.as_uri(), "dir_info": {"editable": True}}
    fake_distribution(site, "stale", "1.0", direct_url__json=json.dumps(about), entry_points__txt="")
    found = by_name(plugins_check.stale_entry_points())["stale"]
    assert found.state == "broken"
    assert "lmopt.backends new" in found.text
    assert found.repair == f'{sys.executable} -m pip install -e "{project}"'


def test_more_threads_than_processors_are_a_warning(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    found = by_name(machine_check.check_machine())
    assert found["OMP_NUM_THREADS"].state == "warning"
    assert found["OMP_NUM_THREADS"].repair.startswith("export OMP_NUM_THREADS=")


def test_a_cache_on_a_folder_that_cannot_be_written(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine_check.os, "access", lambda *_: False)
    assert by_name(machine_check.check_machine())["cache"].state == "broken"


def test_telemetry(monkeypatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    found = by_name(machine_check.check_telemetry())
    assert found["onnxruntime"].state == "ok"
    assert "import order" not in found
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.setitem(sys.modules, "onnxruntime", object())
    found = by_name(machine_check.check_telemetry())
    assert found["onnxruntime"].state == "warning"
    assert found["import order"].state == "warning"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "never connects" in by_name(machine_check.check_telemetry())["Hugging Face hub"].text


def test_accelerators_are_listed_with_their_reasons(monkeypatch) -> None:
    usable = [Usable("CUDA", False, "no driver"), Usable("ONNX Runtime CUDA", True, "compiled in")]
    monkeypatch.setattr(machine_check, "accelerators", lambda: usable)
    assert machine_check.check_accelerators() == [
        Finding("accelerators", "CUDA", "missing", "no driver"),
        Finding("accelerators", "ONNX Runtime CUDA", "ok", "compiled in"),
    ]
