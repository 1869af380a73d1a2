"""The registry, against fake distributions on `sys.path`: no pip, no network, nothing installed."""

import importlib
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lmopt.errors import (
    AmbiguousPluginError,
    BrokenPluginError,
    NotInstalledError,
    PluginError,
    UnknownPluginError,
)
from lmopt.registry import Registry, backends, exporters, pip_line
from lmopt.spec import BackendSpec, Capabilities, ExporterSpec

SPEC = """
from lmopt.spec import BackendSpec, Capabilities, Requirement

BACKEND = BackendSpec(
    name={name!r},
    engine={engine!r},
    can=Capabilities(formats=("onnx",)),
    requires={requires},
    api={api},
)
"""

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a fake distribution with one entry point on `sys.path`, as pip would."""
    count = 0
    before = set(sys.modules)

    def put(
        distribution: str,
        name: str,
        value: str,
        source: str | None = None,
        *,
        group: str = "lmopt.backends",
    ) -> Path:
        nonlocal count
        count += 1
        site = tmp_path / f"site{count}"
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
        if source is not None:
            (site / f"{value.partition(':')[0]}.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        return site

    yield put
    for module in set(sys.modules) - before:
        if module.startswith("fake_"):
            del sys.modules[module]


def spec_source(
    name: str = "fake", engine: str = "fake_engine:open_engine", requires: str = "()", api: int = 1
) -> str:
    return SPEC.format(name=name, engine=engine, requires=requires, api=api)


def test_a_stranger_is_found_by_name(install: Install) -> None:
    install("lmopt-fake", "fake", "fake_spec:BACKEND", spec_source())
    assert "fake" in backends.names()
    spec = backends.spec("fake")
    assert isinstance(spec, BackendSpec)
    assert spec.can.formats == ("onnx",)


def test_listing_names_imports_nothing(install: Install) -> None:
    install("lmopt-fake", "fake", "fake_bomb:BACKEND", "raise RuntimeError('imported')")
    assert "fake" in backends.names()
    assert "fake_bomb" not in sys.modules


def test_only_the_spec_that_is_asked_for_is_imported(install: Install) -> None:
    install("lmopt-one", "one", "fake_one:BACKEND", spec_source("one"))
    install("lmopt-two", "two", "fake_two:BACKEND", spec_source("two"))
    backends.spec("one")
    assert "fake_one" in sys.modules
    assert "fake_two" not in sys.modules


def test_the_engine_is_imported_by_load_only(install: Install) -> None:
    site = install("lmopt-fake", "fake", "fake_spec:BACKEND", spec_source())
    (site / "fake_engine.py").write_text("def open_engine(request):\n    return 'opened'\n")
    backends.spec("fake")
    assert "fake_engine" not in sys.modules
    assert backends.load("fake")(None) == "opened"
    assert "fake_engine" in sys.modules


def test_load_takes_another_target(install: Install) -> None:
    site = install("lmopt-fake", "fake", "fake_spec:BACKEND", spec_source())
    (site / "fake_other.py").write_text("VALUE = 7\n")
    assert backends.load("fake", "fake_other:VALUE") == 7


def test_unknown_name_suggests_a_near_one_and_lists_all() -> None:
    with pytest.raises(UnknownPluginError) as caught:
        backends.spec("onnxruntme")
    message = str(caught.value)
    assert "Did you mean 'onnxruntime'?" in message
    for name in backends.names():
        assert name in message
    assert isinstance(caught.value, LookupError)


def test_unknown_name_far_from_all_suggests_nothing() -> None:
    with pytest.raises(UnknownPluginError) as caught:
        backends.spec("zzzzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_unknown_name_in_an_empty_group_says_none() -> None:
    empty: Registry[BackendSpec] = Registry("lmopt.nothing.here", "widget", BackendSpec)
    assert empty.names() == ()
    with pytest.raises(UnknownPluginError, match=r"no widget is named 'x'.* Installed: none"):
        empty.spec("x")


def test_two_distributions_with_one_name_are_both_named(install: Install) -> None:
    install("lmopt-first", "fake", "fake_a:BACKEND", spec_source())
    install("lmopt-second", "fake", "fake_b:BACKEND", spec_source())
    with pytest.raises(AmbiguousPluginError) as caught:
        backends.spec("fake")
    assert "lmopt-first" in str(caught.value)
    assert "lmopt-second" in str(caught.value)
    assert "fake_a" not in sys.modules
    assert "fake_b" not in sys.modules


def test_an_ambiguous_name_does_not_disturb_others(install: Install) -> None:
    install("lmopt-first", "fake", "fake_a:BACKEND", spec_source())
    install("lmopt-second", "fake", "fake_b:BACKEND", spec_source())
    install("lmopt-good", "good", "fake_good:BACKEND", spec_source("good"))
    assert backends.spec("good").name == "good"
    (ambiguous,) = (one for one in backends.status() if one.name == "fake")
    assert ambiguous.spec is None
    assert ambiguous.distribution == "lmopt-first, lmopt-second"
    assert "Uninstall" in ambiguous.problem


@pytest.mark.parametrize("second", ["lmopt-fake", "lmopt-fake-again"])
def test_identical_duplicates_are_folded(install: Install, second: str) -> None:
    install("lmopt-fake", "fake", "fake_spec:BACKEND", spec_source())
    install(second, "fake", "fake_spec:BACKEND", spec_source())
    assert backends.spec("fake").name == "fake"
    assert backends.names().count("fake") == 1


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise RuntimeError('old driver')", "RuntimeError: old driver"),
        ("import fake_absent_module", "ModuleNotFoundError: No module named 'fake_absent_module'"),
        ("def broken(:\n", "SyntaxError"),
        ("OTHER = 1\n", "AttributeError"),
    ],
    ids=["raises", "imports-missing", "syntax", "no-attribute"],
)
def test_a_broken_spec_names_its_distribution_and_the_repair(
    install: Install, source: str, says: str
) -> None:
    install("lmopt-fake", "fake", "fake_broken:BACKEND", source)
    with pytest.raises(BrokenPluginError) as caught:
        backends.spec("fake")
    message = str(caught.value)
    assert says in message
    assert pip_line("lmopt-fake") in message
    assert f"{sys.executable} -m pip uninstall lmopt-fake" in message
    assert caught.value.__cause__ is not None
    assert isinstance(caught.value, ImportError)


def test_a_broken_neighbour_is_listed_and_hides_nothing(install: Install) -> None:
    install("lmopt-broken", "broken", "fake_broken:BACKEND", "raise RuntimeError('old driver')")
    install("lmopt-good", "good", "fake_good:BACKEND", spec_source("good"))
    assert backends.spec("good").name == "good"
    status = {one.name: one for one in backends.status()}
    assert status["good"].problem == ""
    assert status["good"].distribution == "lmopt-good"
    assert status["broken"].spec is None
    assert status["broken"].distribution == "lmopt-broken"
    assert "old driver" in status["broken"].problem
    assert "-m pip install lmopt-broken" in status["broken"].problem
    assert "good" in backends.ready()
    assert "broken" not in backends.ready()


def test_wrong_contract_version_says_both_and_how_to_update(install: Install) -> None:
    install("lmopt-fake", "fake", "fake_spec:BACKEND", spec_source(api=99))
    with pytest.raises(BrokenPluginError) as caught:
        backends.spec("fake")
    message = str(caught.value)
    assert "version 99" in message
    assert "this lmopt has version 1" in message
    assert "-m pip install --upgrade lmopt-fake" in message


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("BACKEND = {'name': 'fake'}\n", "a dict, not a BackendSpec"),
        (
            "from lmopt.spec import ExporterSpec\nBACKEND = ExporterSpec('fake', 'a:b', 'onnx')\n",
            "a ExporterSpec, not a BackendSpec",
        ),
    ],
    ids=["dict", "other-kind"],
)
def test_an_entry_point_of_the_wrong_type_is_refused(install: Install, source: str, what: str) -> None:
    install("lmopt-fake", "fake", "fake_spec:BACKEND", source)
    with pytest.raises(BrokenPluginError) as caught:
        backends.spec("fake")
    assert what in str(caught.value)
    assert "lmopt-fake" in str(caught.value)


def test_a_missing_module_names_the_exact_pip_line(install: Install) -> None:
    needs = "(Requirement('fake_absent', 'lmopt-fake[gpu]'), Requirement('json', 'never-needed'))"
    install("lmopt-fake", "fake", "fake_spec:BACKEND", spec_source(requires=needs))
    assert backends.spec("fake").name == "fake"  # data stay readable
    with pytest.raises(NotInstalledError) as caught:
        backends.load("fake")
    message = str(caught.value)
    assert "'fake_absent'" in message
    assert f'{sys.executable} -m pip install "lmopt-fake[gpu]"' in message
    assert "never-needed" not in message
    assert "fake_engine" not in sys.modules
    (status,) = (one for one in backends.status() if one.name == "fake")
    assert status.spec is not None
    assert status.problem == message
    assert "fake" not in backends.ready()


def test_two_modules_from_one_extra_give_one_argument(install: Install) -> None:
    needs = "(Requirement('fake_absent_a', 'lmopt-fake[x]'), Requirement('fake_absent_b', 'lmopt-fake[x]'))"
    install("lmopt-fake", "fake", "fake_spec:BACKEND", spec_source(requires=needs))
    with pytest.raises(NotInstalledError) as caught:
        backends.load("fake")
    assert str(caught.value).count("lmopt-fake[x]") == 1


@pytest.mark.parametrize(
    ("engine_source", "says"),
    [
        ("raise OSError('libfoo.so.9: cannot open')", "libfoo.so.9"),
        ("other = 1\n", "AttributeError"),
        (None, "ModuleNotFoundError"),
    ],
    ids=["raises", "no-attribute", "no-module"],
)
def test_an_engine_that_cannot_be_imported_is_broken(
    install: Install, engine_source: str | None, says: str
) -> None:
    site = install("lmopt-fake", "fake", "fake_spec:BACKEND", spec_source())
    if engine_source is not None:
        (site / "fake_engine.py").write_text(engine_source)
    with pytest.raises(BrokenPluginError) as caught:
        backends.load("fake")
    assert says in str(caught.value)
    assert "fake_engine:open_engine" in str(caught.value)
    assert "lmopt doctor" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_run_time_registration_wins_and_can_be_taken_back(install: Install) -> None:
    install("lmopt-fake", "fake", "fake_spec:BACKEND", spec_source())
    mine = BackendSpec("fake", "fake_engine:open_engine", Capabilities(formats=("module",)))
    backends.register(mine)
    try:
        assert backends.spec("fake") is mine
        (status,) = (one for one in backends.status() if one.name == "fake")
        assert status.distribution == ""
    finally:
        backends.unregister("fake")
    assert backends.spec("fake") is not mine
    backends.unregister("fake")  # twice is harmless


def test_exporters_are_found_the_same_way(install: Install) -> None:
    source = "from lmopt.spec import ExporterSpec\nE = ExporterSpec('fmt', 'fake_export:write', 'fmt')\n"
    site = install("lmopt-fake", "fmt", "fake_fmt:E", source, group="lmopt.exporters")
    (site / "fake_export.py").write_text("def write(request):\n    return {'wrote': True}\n")
    assert isinstance(exporters.spec("fmt"), ExporterSpec)
    assert exporters.load("fmt")(None) == {"wrote": True}
    assert "fmt" not in backends.names()


def test_every_plugin_error_is_caught_by_its_root() -> None:
    for error in (UnknownPluginError, AmbiguousPluginError, BrokenPluginError, NotInstalledError):
        assert issubclass(error, PluginError)


@pytest.mark.parametrize("group", ["lmopt.backends", "lmopt.exporters"])
def test_installed_entry_points_equal_pyproject(group: str) -> None:
    root = Path(__file__).parents[1]
    with (root / "pyproject.toml").open("rb") as file:
        written = tomllib.load(file)["project"]["entry-points"][group]
    installed = {ep.name: ep.value for ep in entry_points(group=group) if ep.dist and ep.dist.name == "lmopt"}
    assert installed == written, (
        f"the installed entry points of {group} are stale; run: {sys.executable} -m pip install -e ."
    )


def test_specs_load_with_nothing_heavy_imported() -> None:
    code = (
        "import sys\n"
        "from lmopt.registry import backends, exporters\n"
        "backends.status(); exporters.status()\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'tensorrt'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
