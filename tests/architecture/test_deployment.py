"""An artefact runs where only lmopt's base dependencies and one engine are installed: no torch.

The environment is a real one, made of the wheel that would be published and of the distributions that the
wheel declares, found by following its metadata. It is linked together from the packages of the
running Python, so that nothing is downloaded.
"""

import importlib.metadata
import json
import os
import subprocess
import sysconfig
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ABSENT = ["torch", "transformers", "onnx", "onnxscript", "accelerate", "gguf", "rich", "typer", "matplotlib"]
PROMPTS = ["the cat sat on", "the dog", "door of the old house by the sea and the mat"]
NEW_TOKENS = 12

GENERATE = f"""
import json, sys
import lmopt
with lmopt.Runtime(sys.argv[1], backend=sys.argv[2]) as runtime:
    found = runtime.generate({PROMPTS!r}, max_new_tokens={NEW_TOKENS}, do_sample=False)
print(json.dumps([[list(one.token_ids), one.text] for one in found]))
"""


@dataclass(frozen=True)
class Deployment:
    """An environment that holds what a deployment needs and nothing else."""

    python: Path
    distributions: frozenset[str]

    def run(self, code: str, *arguments: str) -> str:
        """Run code in it, far from this repository, and return what it prints."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.python, "-c", code, *arguments],
            cwd=self.python.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def _needed(requirements: Iterable[str]) -> frozenset[str]:
    """Follow the metadata of installed distributions from some requirements to all they need."""
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [Requirement(text) for text in requirements]
    while queue:
        one = queue.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in seen or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        seen.add((name, extras))
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                need.marker = None
                queue.append(need)
    return frozenset(name for name, _ in seen)


def _link(distribution: str, site: Path) -> None:
    """Make an installed distribution importable from another site folder."""
    installed = importlib.metadata.distribution(distribution)
    tops = {path.parts[0] for path in installed.files or [] if path.parts[0] not in {"..", "__pycache__"}}
    for top in tops:
        link = site / top
        if not link.exists():
            link.symlink_to(Path(str(installed.locate_file(top))))


@pytest.fixture(scope="module")
def deployment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """A virtual environment with the wheel, what it requires, and ONNX Runtime."""
    folder = tmp_path_factory.mktemp("deployment") / "venv"
    venv.create(folder, symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    requires = importlib.metadata.Distribution.at(next(site.glob("lmopt-*.dist-info"))).requires or []
    names = _needed([*requires, "onnxruntime"])
    for name in names:
        _link(name, site)
    return Deployment(folder / "bin" / "python", names)


@pytest.fixture(scope="module")
def artifact(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, exported where torch is."""
    import lmopt

    folder = tmp_path_factory.mktemp("exported") / "artifact"
    lmopt.Exporter("onnx").export(lmopt.Model.from_pretrained(tiny_folder), folder)
    return folder


def test_the_wheel_ships_the_kit_and_the_type_marker_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"lmopt/py.typed", "lmopt/testing/__init__.py", "lmopt/cli/__init__.py"} <= names
    outside = {name for name in names if not name.startswith(("lmopt/", "lmopt-"))}
    assert not outside


def test_the_base_dependencies_bring_no_framework(deployment: Deployment) -> None:
    assert {"numpy", "tokenizers", "onnxruntime"} <= deployment.distributions
    assert not deployment.distributions & set(ABSENT)
    found = deployment.run(
        "import importlib.util, json, lmopt\n"
        f"found = [name for name in {ABSENT!r} if importlib.util.find_spec(name)]\n"
        "print(json.dumps([found, lmopt.__file__]))"
    )
    present, home = json.loads(found)
    assert not present
    assert Path(home).is_relative_to(deployment.python.parents[1]), "this is not the wheel's lmopt"


def test_all_but_rooms_of_absent_packages_and_the_command_line_can_be_imported(
    deployment: Deployment,
) -> None:
    found = deployment.run(
        "import importlib, json, pkgutil, lmopt\n"
        "names = [one.name for one in pkgutil.walk_packages(lmopt.__path__, 'lmopt.')]\n"
        "away = ('lmopt.backends.torch.', 'lmopt.backends.tensorrt.', 'lmopt.training.')\n"
        "away += ('lmopt.cli.', 'lmopt.testing.__main__', 'lmopt.interop.lm_eval', 'lmopt.interop.harness')\n"
        "names = [n for n in names if not n.startswith(away) or n.endswith('.spec')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(json.dumps(names))"
    )
    assert {"lmopt.runtime", "lmopt.backends.onnxruntime.engine", "lmopt.testing"} <= set(json.loads(found))


def test_an_artifact_generates_the_same_tokens_without_torch(
    deployment: Deployment, tiny_folder: Path, artifact: Path
) -> None:
    import lmopt

    with lmopt.Runtime(lmopt.Model.from_pretrained(tiny_folder), backend="torch") as runtime:
        expected = [
            [list(one.token_ids), one.text]
            for one in runtime.generate(PROMPTS, max_new_tokens=NEW_TOKENS, do_sample=False)
        ]
    assert len({tuple(ids) for ids, _ in expected}) > 1, "the prompts must lead to different answers"
    assert json.loads(deployment.run(GENERATE, str(artifact), "onnxruntime")) == expected


def test_an_engine_that_is_not_there_is_named_with_its_pip_line(
    deployment: Deployment, artifact: Path
) -> None:
    said = deployment.run(
        "import lmopt, sys\n"
        "from lmopt.errors import NotInstalledError\n"
        "try:\n    lmopt.Runtime(sys.argv[1], backend='torch')\n"
        "except NotInstalledError as error:\n    print(error)",
        str(artifact),
    )
    assert "pip install" in said
    assert "lmopt[torch]" in said


def test_the_command_line_says_what_to_install(deployment: Deployment) -> None:
    """Without the extra `cli`, `lmopt` must not die of an ImportError."""
    done = subprocess.run(
        [deployment.python, "-c", "import lmopt.cli; lmopt.cli.main()"],
        cwd=deployment.python.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "lmopt[cli]" in done.stderr
