"""House rules that can be read off the files, without running lmopt."""

import ast
import re
import runpy
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "lmopt"
MODULES = sorted(SOURCE.rglob("*.py"))

# Hosts of package registries, put together here so that this file does not name them either.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("pypi", "nvidia", "com"),
        ("pypi", "ngc", "nvidia", "com"),
        ("download", "pytorch", "org"),
        ("anaconda", "org"),
        ("registry", "npmjs", "org"),
        ("deb", "debian", "org"),
    )
]


def _tracked_files() -> list[Path]:
    """Files that git tracks, or would if they were added."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_modules_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    # An empty `__init__.py` is no module to read; counting it would only lower the median.
    median = statistics.median(length for length in lengths.values() if length > 1)
    longest = max(lengths, key=lambda path: lengths[path])
    assert median < 150, f"the median module has {median} lines"
    assert lengths[longest] <= 500, f"{longest.relative_to(ROOT)} has {lengths[longest]} lines"


def test_no_file_names_a_package_registry() -> None:
    found = []
    for path in _tracked_files():
        text = path.read_bytes().decode("utf-8", errors="replace").lower()
        found += [f"{path.relative_to(ROOT)}: {host}" for host in REGISTRY_HOSTS if host in text]
    assert not found


def test_the_library_does_not_print() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found


def test_no_module_is_called_utils() -> None:
    assert not [path for path in MODULES if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def test_the_rooms_and_the_roof_stay_empty_where_a_spec_would_drag_them_in() -> None:
    """Importing `backends/x/spec.py` runs `backends/x/__init__.py` first."""
    for spec in SOURCE.glob("backends/*/spec.py"):
        for init in (spec.with_name("__init__.py"), SOURCE / "backends" / "__init__.py"):
            body = ast.parse(init.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in body), f"{init.relative_to(ROOT)} has code"


def test_the_changelog_has_room_for_the_next_change() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_the_map_is_up_to_date() -> None:
    found = runpy.run_path(str(ROOT / "scripts" / "write_map.py"))
    page = (ROOT / "docs" / "reference" / "map.md").read_text(encoding="utf-8")
    assert page == found["render"](), "run: python scripts/write_map.py"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        path for path in MODULES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_every_decision_record_has_context_choice_and_cost() -> None:
    records = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    for path in records:
        headings = re.findall(r"^## (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert headings == ["Context", "Choice", "Cost"], path.name
