"""Rules about an engine's life: opening, reporting, ownership, files, closing."""

import shutil
import tempfile
import unittest
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from lmopt.artifact import MANIFEST, Artifact
from lmopt.contracts import ArtifactView, Engine, EngineReport, SupportsTaps
from lmopt.errors import ClosedError, CorruptArtifactError, LmoptError, UnsafeArtifactError
from lmopt.testing.case import Case, Subject
from lmopt.testing.judge import feed, insist, insist_equal, make_rows, pack, refuses, truth


def check_protocols_match_capabilities(case: Case) -> None:
    """The engine has every method of the contract, and `SupportsTaps` exactly where "taps" is declared."""
    with case.engine() as engine:
        insist(
            isinstance(engine, Engine), f"{type(engine).__name__} lacks a member of lmopt.contracts.Engine"
        )
        insist(isinstance(engine.ragged, bool), f"ragged is {engine.ragged!r}, not a bool")
        insist(
            engine.facts.vocab_size == case.subject.facts.vocab_size,
            f"facts.vocab_size is {engine.facts.vocab_size}; the model's is {case.subject.facts.vocab_size}",
        )
        declared, has = "taps" in case.spec.can.features, isinstance(engine, SupportsTaps)
        insist(
            declared == has,
            f"the feature 'taps' is {'' if declared else 'not '}declared, but the engine "
            f"{'has' if has else 'lacks'} the methods of SupportsTaps",
        )


def check_taps_show_values(case: Case) -> None:
    """`taps` gives the named values as arrays, `forward` still works after, and unknown names are refused."""
    if "taps" not in case.spec.can.features:
        raise unittest.SkipTest("the feature 'taps' is not declared")
    rows = make_rows(case, [7], seed=80)
    with case.engine() as engine:
        assert isinstance(engine, SupportsTaps)
        names = list(engine.tap_names())
        insist(bool(names), "tap_names() is empty")
        insist(len(set(names)) == len(names), "tap_names() repeats a name")
        picked = [names[0], names[len(names) // 2], names[-1]]
        values = engine.taps(rows[0][None], picked)
        insist(set(values) == set(picked), f"taps gave {sorted(values)}; asked for {picked}")
        for name, value in values.items():
            insist(isinstance(value, np.ndarray), f"tap {name!r} is a {type(value).__name__}, not an array")
        refuses(lambda: engine.taps(rows[0][None], ["no such tap"]), LmoptError, when="an unknown tap")
        given, _ = feed(engine, rows)
        insist_equal(case, truth(case, rows), given, "forward after taps")


def check_threads_are_honoured(case: Case) -> None:
    """A thread count is what the report says where "threads" is declared, and refused where it is not."""
    if "threads" not in case.spec.can.features:
        refuses(lambda: case.open(threads=1).close(), LmoptError, when="threads=1, which is not declared,")
        return
    for threads in (1, 2):
        engine = case.open(threads=threads)
        reported = engine.report().threads
        engine.close()
        insist(reported == threads, f"asked for {threads} thread(s), the report says {reported}")


def check_report_is_truthful(case: Case) -> None:
    """The report names this backend, the device and compute type in use, and installed versions."""
    with case.engine() as engine:
        feed(engine, make_rows(case, [3], seed=81))
        report = engine.report()
    insist(isinstance(report, EngineReport), f"report() gave a {type(report).__name__}")
    insist(report.backend == case.backend, f"report.backend is {report.backend!r}, not {case.backend!r}")
    insist(
        report.device.partition(":")[0] == case.device.partition(":")[0],
        f"report.device is {report.device!r}; asked for {case.device!r}",
    )
    insist(report.dtype == case.dtype, f"report.dtype is {report.dtype!r}; asked for {case.dtype!r}")
    insist(report.threads >= 0, f"report.threads is {report.threads}")
    insist(bool(report.versions), "report.versions is empty; it must say what the engine stands on")
    for distribution, stated in report.versions.items():
        try:
            installed = version(distribution)
        except PackageNotFoundError:
            installed = "not installed"
        insist(stated == installed, f"report.versions says {distribution} {stated}; it is {installed}")


def check_auto_dtype_is_a_declared_one(case: Case) -> None:
    """The compute type `"auto"` resolves to a declared one, and the report names it."""
    engine = case.open(dtype="auto")
    dtype = engine.report().dtype
    engine.close()
    insist(dtype in case.spec.can.dtypes, f"'auto' became {dtype!r}; declared: {case.spec.can.dtypes}")


def check_results_belong_to_the_caller(case: Case) -> None:
    """Later calls leave earlier results alone; writing into results or inputs leaves the engine alone."""
    rows = make_rows(case, [6, 6], seed=82)
    expected = truth(case, rows)
    with case.engine() as engine:
        ids, lengths = pack([row[:4] for row in rows])
        ids_before, lengths_before = ids.copy(), lengths.copy()
        first, state = engine.forward(ids, lengths, engine.begin(2))
        insist(
            np.array_equal(ids, ids_before) and np.array_equal(lengths, lengths_before),
            "forward wrote into input_ids or lengths",
        )
        kept = first.copy()
        other, _ = feed(engine, make_rows(case, [4, 4], seed=83))
        del other
        # The caller's own arrays: what happens to them now must not reach the state.
        ids[:], lengths[:] = 0, 1
        second, state = feed(engine, [row[4:5] for row in rows], state)
        insist(np.array_equal(first, kept), "a later forward changed the logits of an earlier one")
        insist_equal(case, [full[4:5] for full in expected], second, "a token after the inputs were reused")
        insist(first.flags.writeable, "logits are read-only; they belong to the caller")
        first[:] = np.nan
        third, _ = feed(engine, [row[5:6] for row in rows], state)
        insist_equal(case, [full[5:6] for full in expected], third, "a token after logits were overwritten")


def check_two_engines_coexist(case: Case) -> None:
    """Two engines of one model work side by side, and closing one leaves the other alone."""
    rows = [make_rows(case, [5], seed=84), make_rows(case, [5], seed=85)]
    expected = [truth(case, row) for row in rows]
    one, two = case.open(), case.open()
    try:
        _, first = feed(one, [rows[0][0][:3]])
        _, second = feed(two, [rows[1][0][:3]])
        given, _ = feed(one, [rows[0][0][3:]], first)
        insist_equal(case, [expected[0][0][3:]], given, "the first of two engines")
        one.close()
        given, _ = feed(two, [rows[1][0][3:]], second)
        insist_equal(case, [expected[1][0][3:]], given, "the second engine after the first was closed")
    finally:
        one.close()
        two.close()


def check_close_is_idempotent_and_reopenable(case: Case) -> None:
    """Closing twice is harmless, and the same model opens again with the same result."""
    rows = make_rows(case, [5], seed=86)
    for _ in range(2):
        engine = case.open()
        given, _ = feed(engine, rows)
        engine.close()
        engine.close()
        insist_equal(case, truth(case, rows), given, "an engine that was opened again")


def check_use_after_close_is_refused(case: Case) -> None:
    """After `close`, `begin` and `forward` raise `ClosedError`."""
    ids, lengths = pack(make_rows(case, [3], seed=87))
    engine = case.open()
    state = engine.begin(1)
    engine.close()
    refuses(lambda: engine.forward(ids, lengths, state), ClosedError, when="forward after close")
    refuses(lambda: engine.begin(1), ClosedError, when="begin after close")


def check_tampered_artifact_is_refused(case: Case) -> None:
    """A changed file is refused with `CorruptArtifactError`; one that is not read changes no result."""
    artifact = case.subject.artifact
    if artifact is None:
        raise unittest.SkipTest("the engine takes a live module, not files")
    rows = make_rows(case, [9], seed=88)
    refused = []
    files = sorted(file for file in artifact.path.rglob("*") if file.is_file() and file.name != MANIFEST)
    for file in files:
        name = str(file.relative_to(artifact.path))
        with tempfile.TemporaryDirectory(prefix="lmopt-testing-") as folder:
            copy = Path(folder) / "model"
            shutil.copytree(artifact.path, copy)
            _damage(copy / name)
            subject = _with_artifact(case.subject, Artifact.open(copy, verify=False))
            try:
                engine = case.open(subject=subject)
            except CorruptArtifactError as error:
                insist(
                    file.name in str(error), f"the message does not name the damaged file {name!r}: {error}"
                )
                refused.append(name)
                continue
            given, _ = feed(engine, rows)
            engine.close()
            insist_equal(case, truth(case, rows), given, f"with a damaged {name!r} that was accepted")
    insist(bool(refused), f"no damaged file was refused, of {[file.name for file in files]}")


def check_missing_source_is_refused(case: Case) -> None:
    """A request with neither files nor a module raises a typed error."""
    nothing = _with_artifact(case.subject, None)
    refuses(lambda: case.open(subject=nothing).close(), LmoptError, when="a request without a model")


def check_code_runs_only_when_trusted(case: Case) -> None:
    """Without the option `trust=True`, a file whose reading runs code raises `UnsafeArtifactError`."""
    if "trust" not in case.spec.can.features:
        raise unittest.SkipTest("the feature 'trust' is not declared")
    rows = make_rows(case, [5], seed=89)
    try:
        engine = case.open(options=case.options)
    except UnsafeArtifactError:
        return
    # A format that runs no code needs no grant; then it must simply work.
    given, _ = feed(engine, rows)
    engine.close()
    insist_equal(case, truth(case, rows), given, "an engine opened without trust")


def _with_artifact(subject: Subject, artifact: ArtifactView | None) -> Subject:
    return Subject(subject.name, subject.format, subject.facts, subject.reference, artifact)


def _damage(file: Path) -> None:
    """Invert bytes all over a file, keeping its size."""
    data = bytearray(file.read_bytes())
    for index in range(len(data) // 8, len(data), max(1, len(data) // 64)):
        data[index] ^= 0xFF
    file.write_bytes(bytes(data))


LIFE_CHECKS = (
    check_protocols_match_capabilities,
    check_taps_show_values,
    check_threads_are_honoured,
    check_report_is_truthful,
    check_auto_dtype_is_a_declared_one,
    check_results_belong_to_the_caller,
    check_two_engines_coexist,
    check_close_is_idempotent_and_reopenable,
    check_use_after_close_is_refused,
    check_tampered_artifact_is_refused,
    check_missing_source_is_refused,
    check_code_runs_only_when_trusted,
)
