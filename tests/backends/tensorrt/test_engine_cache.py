"""Compiled engines are found again, healed where damaged, and never loaded from elsewhere by accident."""

import json
import os
import stat
import warnings
from dataclasses import replace

import pytest

from lmopt.backends.tensorrt import engine_cache
from lmopt.backends.tensorrt.building import BuildOptions, Plan
from lmopt.backends.tensorrt.engine_cache import (
    engine_folder,
    graph_of,
    open_plan,
    plan_for,
    plan_key,
    save_plan,
)
from lmopt.backends.tensorrt.flavour import load
from lmopt.backends.tensorrt.profiles import Profile
from lmopt.errors import (
    CorruptArtifactError,
    EngineBuildError,
    UnsafeArtifactError,
    UnsupportedError,
)

OPTIONS = BuildOptions("tensorrt_rtx", ("8.9",), max_batch=2, max_sequence=8)


@pytest.fixture
def artifact(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("LMOPT_CACHE", str(tmp_path / "cache"))
    return exported("lstm", "float32")


@pytest.fixture
def builds(monkeypatch):
    """Count builds, and spare the compiler's time: what is tested here is what becomes of its result."""
    found = []

    def build(model, options, *, facts, timings=b""):
        found.append(options)
        profiles = (Profile("decode", (1, 1, 2), (1, 1, 1), (0, 0, 0)),)
        return Plan(
            b"native code" * 100, "tensorrt_rtx", load("tensorrt_rtx").version, (), (), profiles, "float32"
        )

    monkeypatch.setattr(engine_cache, "build_plan", build)
    return found


def ask(artifact, options=OPTIONS, **more):
    return plan_for(artifact, options, facts=artifact.facts, **more)


def entry():
    return next(one for one in engine_folder().path.iterdir() if one.is_dir())


def test_a_real_plan_is_built_once_and_found_whole(artifact):
    built = ask(artifact)
    found = ask(artifact)
    assert not built.from_cache
    assert found.from_cache
    assert found.data == built.data
    assert found == replace(built, from_cache=True, seconds=0.0)


def test_everything_on_disk_is_for_this_user_only(artifact, builds):
    ask(artifact)
    folder = engine_folder().path
    for one in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(one.stat().st_mode) & 0o077 == 0, one
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((entry() / "plan").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "damage", ["byte", "cut", "longer", "missing", "record", "seal", "other key", "no json"]
)
def test_a_damaged_entry_is_built_again_with_one_warning(damage, artifact, builds):
    ask(artifact)
    plan, record = entry() / "plan", entry() / "record.json"
    if damage == "byte":
        plan.write_bytes(b"N" + plan.read_bytes()[1:])
    elif damage == "cut":
        plan.write_bytes(plan.read_bytes()[:-1])
    elif damage == "longer":
        plan.write_bytes(plan.read_bytes() + b"!")
    elif damage == "missing":
        plan.unlink()
    elif damage == "other key":
        (engine_folder().path / "key").write_bytes(bytes(32))
    elif damage == "no json":
        record.write_bytes(b"{")
    else:
        told = json.loads(record.read_text())
        if damage == "record":
            told["record"]["plan"]["compute_type"] = "float16"
        else:
            told["seal"] = "0" * 64
        record.write_text(json.dumps(told))
    with pytest.warns(RuntimeWarning, match="is not used and is built again") as caught:
        healed = ask(artifact)
    assert len(caught) == 1
    assert not healed.from_cache
    assert len(builds) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(artifact).from_cache


def test_a_plan_with_a_hash_that_fits_but_no_seal_is_not_loaded(artifact, builds):
    """An attacker can write a plan and its right SHA-256; the user's key they do not have."""
    import hashlib

    ask(artifact)
    plan, record = entry() / "plan", entry() / "record.json"
    evil = b"evil code!!" * 100
    told = json.loads(record.read_text())
    told["record"]["sha256"] = hashlib.sha256(evil).hexdigest()
    plan.write_bytes(evil)
    record.write_text(json.dumps(told))
    with pytest.warns(RuntimeWarning, match="not sealed by this user's key"):
        assert ask(artifact).data != evil


def test_an_entry_that_was_moved_to_another_name_is_not_loaded(artifact, builds):
    ask(artifact)
    other = replace(OPTIONS, tf32=True)
    before = entry()
    ask(artifact, other)
    after = next(one for one in engine_folder().path.iterdir() if one.is_dir() and one != before)
    for name in ("plan", "record.json"):
        (after / name).write_bytes((before / name).read_bytes())
    with pytest.warns(RuntimeWarning, match="not sealed"):
        assert not ask(artifact, other).from_cache


@pytest.mark.parametrize("what", ["folder open", "plan open", "entry link", "plan link", "key link"])
def test_what_others_could_have_written_is_refused(what, artifact, builds, tmp_path):
    ask(artifact)
    folder, inside = engine_folder().path, entry()
    if what == "folder open":
        folder.chmod(0o770)
    elif what == "plan open":
        (inside / "plan").chmod(0o622)
    else:
        victim = {"entry link": inside, "plan link": inside / "plan", "key link": folder / "key"}[what]
        victim.rename(tmp_path / "moved")
        victim.symlink_to(tmp_path / "moved")
    with pytest.raises(UnsafeArtifactError):
        ask(artifact)
    assert len(builds) == 1


def test_another_owner_is_refused(artifact, builds, monkeypatch):
    ask(artifact)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(UnsafeArtifactError, match="belongs to user"):
        ask(artifact)


def test_a_build_that_fails_leaves_nothing(artifact, monkeypatch):
    def fail(*_args, **_more):
        raise EngineBuildError("no")

    monkeypatch.setattr(engine_cache, "build_plan", fail)
    with pytest.raises(EngineBuildError):
        ask(artifact)
    assert not [one for one in engine_folder().path.iterdir() if one.is_dir()]


def test_what_a_killed_builder_left_is_swept(artifact, builds):
    ask(artifact)
    name = entry().name
    rest = engine_folder().path / f".{name}.tmp-00000000"
    rest.mkdir(mode=0o700)
    (rest / "plan").write_bytes(b"half")
    engine_folder().remove(name)
    ask(artifact)
    assert not rest.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"compute_capabilities": ("8.6",)},
        {"workspace_bytes": 1 << 28},
        {"optimization_level": 2},
        {"tf32": True},
        {"max_batch": 3},
        {"max_sequence": 9},
        {"max_past": 7},
        {"profiles": (Profile("own", (1, 1, 1), (1, 1, 1), (0, 0, 0)),)},
    ],
    ids=lambda one: next(iter(one)),
)
def test_every_choice_is_part_of_the_key(change, artifact, builds):
    ask(artifact)
    assert not ask(artifact, replace(OPTIONS, **change)).from_cache


def test_compiler_device_and_graph_are_part_of_the_key(artifact, tmp_path):
    rtx, model = load("tensorrt_rtx"), graph_of(artifact)

    def key(model=model, flavour=rtx, device=None, options=OPTIONS):
        return json.dumps(
            plan_key(model, options, flavour, facts=artifact.facts, device=device), sort_keys=True
        )

    assert key() == key()
    assert key() != key(flavour=replace(rtx, version="1.7.1.117"))
    # Where it lies is no part of it; what it and its data hold is.
    copy = tmp_path / "copy"
    copy.mkdir()
    for one in artifact.path.iterdir():
        (copy / one.name).write_bytes(one.read_bytes())
    assert key(copy / "model.onnx") == key()
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    assert key(copy / "model.onnx") != key()

    class Standard:
        __version__ = "11.4.0.106"

    standard = replace(rtx, name="tensorrt", module=Standard, version="11.4.0.106")
    about = {
        "name": "A",
        "compute_capability": "8.9",
        "multiprocessors": 76,
        "memory_bytes": 1,
        "driver": "1",
        "runtime": "13",
    }
    first = key(flavour=standard, device=about)
    for name in about:
        assert key(flavour=standard, device={**about, name: "other"}) != first


def test_rtx_builds_for_the_gpu_that_will_run_it(artifact, builds):
    options = replace(OPTIONS, compute_capabilities=())
    ask(artifact, options, device={"compute_capability": "12.0"})
    assert builds[0].compute_capabilities == ("12.0",)


def test_a_foreign_plan_needs_trust_by_name(artifact, tmp_path):
    built, path = ask(artifact), tmp_path / "model.plan"
    save_plan(built, path)
    for trust in (False, "yes"):
        with pytest.raises(UnsafeArtifactError, match="trust_engine=True"):
            open_plan(path, trust_engine=trust, options=OPTIONS)
    opened = open_plan(path, trust_engine=True, options=OPTIONS)
    assert (opened.data, opened.profiles, opened.inputs) == (built.data, built.profiles, built.inputs)
    path.write_bytes(built.data + b"!")
    with pytest.raises(CorruptArtifactError):
        open_plan(path, trust_engine=True, options=OPTIONS)


def test_a_plan_of_another_version_is_refused(artifact, tmp_path):
    path = tmp_path / "model.plan"
    save_plan(replace(ask(artifact), version="1.6.0.1"), path)
    with pytest.raises(UnsupportedError, match=r"1\.6\.0\.1"):
        open_plan(path, trust_engine=True, options=OPTIONS)


def test_a_graph_of_another_engines_dialect_is_refused(artifact):
    class Fused:
        path = artifact.path
        manifest = {"formats": {"onnx": {"target": "onnxruntime", "files": []}}}  # noqa: RUF012
        facts = artifact.facts

    with pytest.raises(UnsupportedError, match="target='portable'"):
        ask(Fused)
