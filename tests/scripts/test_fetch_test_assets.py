"""An asset is made once, made anew when its recipe changes, and never half there."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_test_assets.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_test_assets", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_file_is_made_once(script: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "asset.txt"
    script.make_once(target, lambda path: path.write_text("first"))
    script.make_once(target, lambda path: path.write_text("second"))
    assert target.read_text() == "first"


def test_a_new_recipe_replaces_a_folder(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder"

    def make(name: str) -> None:
        script.make_once(target, lambda path: (path.mkdir(), (path / name).touch()))

    make("old")
    monkeypatch.setattr(script, "RECIPE", "another")
    make("new")
    assert [one.name for one in target.iterdir()] == ["new"]


def test_a_failure_leaves_nothing(script: ModuleType, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise SystemExit("the hash is wrong")

    with pytest.raises(SystemExit):
        script.make_once(tmp_path / "asset.txt", fail)
    assert not list(tmp_path.iterdir())


def test_the_folder_can_be_chosen(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMOPT_TEST_ASSETS", str(tmp_path))
    assert script.assets_folder() == tmp_path


def test_every_locked_package_has_a_hash() -> None:
    lock = Path(__file__).parents[1] / "assets.lock"
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert all("==" in line and "--hash=sha256:" in line for line in lines)
