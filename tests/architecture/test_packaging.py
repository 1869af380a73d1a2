"""What a stranger gets: the source distribution, the wheel, their metadata, and what the release does."""

import configparser
import importlib.metadata
import importlib.util
import json
import re
import runpy
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lmopt

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


Build = Callable[[Path, str, Path], Path]


@pytest.fixture(scope="module")
def sdist(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, "sdist", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"lmopt-{lmopt.__version__}"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_source_distribution_builds_the_same_wheel(
    build: Build, wheel: Path, sdist: Path, tmp_path: Path
) -> None:
    assert contents(build(sdist, "wheel", tmp_path)) == contents(wheel)


def test_the_source_distribution_can_be_tested(sdist: Path) -> None:
    needed = [
        *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
        *("CITATION.cff", "tests/conftest.py", "tests/assets.lock", "scripts/fetch_test_assets.py"),
        *("examples/third_party_backend/pyproject.toml", "docs/conf.py", "constraints/ci.txt"),
    ]
    assert not [name for name in needed if not (sdist / name).is_file()]
    assert not [path for path in sdist.rglob("*") if path.suffix in {".pyc", ".safetensors", ".onnx"}]


def test_the_wheel_holds_the_licence_and_the_entry_points_and_nothing_strange(wheel: Path) -> None:
    files = contents(wheel)
    info = f"lmopt-{lmopt.__version__}.dist-info"
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert "lmopt/py.typed" in files
    entries = configparser.ConfigParser(delimiters=("=",))
    entries.optionxform = str  # type: ignore[assignment,method-assign]
    entries.read_string(files[f"{info}/entry_points.txt"].decode())
    stated = {**PROJECT["project"]["entry-points"], "console_scripts": PROJECT["project"]["scripts"]}
    assert {group: dict(entries[group]) for group in entries.sections()} == stated
    for targets in stated.values():
        for target in targets.values():
            module = target.partition(":")[0].replace(".", "/")
            assert files.keys() & {f"{module}.py", f"{module}/__init__.py"}, target
    assert {Path(name).suffix for name in files if name.startswith("lmopt/")} <= {
        ".py",
        ".typed",
        ".html",
        ".j2",
    }
    assert sum(map(len, files.values())) < 5e6


def test_the_metadata_is_complete_and_renders(
    wheel: Path, sdist: Path, missing: Callable[[str], NoReturn]
) -> None:
    if importlib.util.find_spec("twine") is None:
        missing(f"checking the metadata needs twine; install it: {sys.executable} -m pip install twine")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "twine",
            "--no-color",
            "check",
            "--strict",
            wheel,
            *sdist.parent.glob("*.tar.gz"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_wheel_installs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """As pip does it, but for the dependencies, which `test_deployment.py` brings."""
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", "-q", wheel], check=True, capture_output=True)
    code = (
        "import json, lmopt; from importlib.metadata import metadata, version\n"
        "print(json.dumps([lmopt.__version__, version('lmopt'), metadata('lmopt').get_all('Provides-Extra')]))"
    )
    said = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    inside, outside, extras = json.loads(said.stdout)
    assert inside == outside == lmopt.__version__
    assert sorted(extras) == sorted(PROJECT["project"]["optional-dependencies"])
    assert (tmp_path / "venv" / "bin" / "lmopt").is_file()


def test_every_extra_says_what_it_promises() -> None:
    found = script("check_extras")
    assert set(found.PROMISES) == {found.BASE, *found.extras()}
    assert found.VENDOR | set(found.WITH) <= set(found.PROMISES)
    for promise in found.PROMISES.values():
        compile(promise, "promise", "exec")


@pytest.mark.network
def test_extras_resolve_and_install(full_sweep: bool, wheel: Path) -> None:
    if not full_sweep:
        pytest.skip("it asks the package index: run with --full-sweep, or scripts/check_extras.py by itself")
    names = ["base", "onnxruntime", "cli"]
    line = [sys.executable, ROOT / "scripts" / "check_extras.py", "--wheel", wheel, "--only", *names]
    done = subprocess.run([*line, "--install", *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("gives what it promises") == len(names)


def test_the_constraints_are_whole_and_within_the_requirements() -> None:
    found = runpy.run_path(str(ROOT / "scripts" / "write_constraints.py"))
    lines = (ROOT / "constraints" / "ci.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(pinned) == sorted(pinned)
    for text in found["wanted"](PROJECT):
        need = Requirement(text)
        name = canonicalize_name(need.name)
        if name in pinned:
            assert need.specifier.contains(pinned[name], prereleases=True), (
                f"{text}, but {name}=={pinned[name]}"
            )
        else:
            # Only what this platform's tests do not install may be absent: extras of GPUs.
            with pytest.raises(importlib.metadata.PackageNotFoundError):
                raise_if_absent(name)


def raise_if_absent(name: str) -> None:
    if name != "lmopt":
        importlib.metadata.distribution(name)
    else:
        raise importlib.metadata.PackageNotFoundError(name)


def workflow(path: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_have_least_rights_and_pinned_actions_and_name_what_is_there(path: Path) -> None:
    found = workflow(path)
    assert found["permissions"] == {"contents": "read"}
    text = path.read_text(encoding="utf-8")
    assert "secrets." not in text
    for job in found["jobs"].values():
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w./-]+@(v\d+|release/v\d+|[0-9a-f]{40})", step["uses"]), step["uses"]
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            for word in re.findall(r"(?:scripts|constraints|\.ci)/[\w./]+", step.get("run", "")):
                assert (ROOT / word).is_file(), word


def test_ci_runs_what_developers_run_and_a_release_checks_before_it_publishes() -> None:
    ci = workflow(ROOT / ".github" / "workflows" / "ci.yml")
    assert [step["run"] for step in ci["jobs"]["run"]["steps"] if "run" in step][-1] == "bash .ci/run"
    release = workflow(ROOT / ".github" / "workflows" / "release.yml")
    jobs = release["jobs"]
    assert jobs["publish"]["needs"] == "attest"
    assert jobs["attest"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    commands = "\n".join(step.get("run", "") for step in jobs["build"]["steps"])
    for part in ("twine check --strict", "check_extras.py", "write_sbom.py", "hatchling version"):
        assert part in commands


def test_the_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == lmopt.__version__
    assert found["license"] == PROJECT["project"]["license"]
    assert found["cff-version"] == "1.2.0"


def test_the_security_policy_points_to_pages_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`([\w./-]+\.(?:yml|txt))`", text):
        assert (ROOT / target).is_file(), target
