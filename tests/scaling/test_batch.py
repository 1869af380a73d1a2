"""Corpus jobs: what comes out, what goes to the errors, what may be resumed."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lmopt
from lmopt.errors import (
    ArtifactExistsError,
    CorruptArtifactError,
    InputError,
    JobMismatchError,
    LockTimeoutError,
    TooManyErrorsError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.scaling import batch
from lmopt.scaling.ledger import Ledger
from lmopt.scaling.rows import row_seed
from lmopt.testing.models import tiny_lstm

ROWS: list[Any] = [{"id": n, "prompt": f"w{n + 3} w5 w7"} for n in range(10)]


@pytest.fixture(scope="module")
def runtime(artifact: Path) -> Any:
    with lmopt.Runtime(artifact, threads=1) as found:
        yield found


def test_rows_are_what_the_runtime_gives_and_fields_are_passed_through(
    artifact: Path, runtime: lmopt.Runtime, tmp_path: Path
) -> None:
    found = batch(artifact, ROWS, tmp_path / "out", rows_per_shard=4, max_new_tokens=6)
    assert (found.rows_in, found.rows_out, found.errors, found.resumed_rows) == (10, 10, 0, 0)
    assert [path.name for path in found.shards] == [
        "part-00000.jsonl",
        "part-00001.jsonl",
        "part-00002.jsonl",
    ]
    for number, row in enumerate(found.rows()):
        alone = runtime.generate(ROWS[number]["prompt"], max_new_tokens=6)
        assert row == {
            **ROWS[number],
            "row": number,
            "output": {
                "text": alone.text,
                "token_ids": alone.token_ids,
                "finish_reason": "length",
                "prompt_tokens": 3,
            },
        }
    assert not (tmp_path / "out" / "errors.jsonl").exists()
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "manifest.json", *(path.name for path in found.shards)
    ]  # fmt: skip


def test_sampled_rows_depend_on_neither_workers_nor_resuming(artifact: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5, "rows_per_shard": 3}
    one = batch(artifact, ROWS, tmp_path / "one", workers=1, **job)
    two = batch(artifact, ROWS, tmp_path / "two", workers=2, **job)
    assert [path.read_bytes() for path in one.shards] == [path.read_bytes() for path in two.shards]
    assert (one.folder / "manifest.json").read_bytes() == (two.folder / "manifest.json").read_bytes()
    other = batch(artifact, ROWS, tmp_path / "other", seed=1, **job)
    assert list(other.rows()) != list(one.rows())
    assert [row["output"]["seed"] for row in one.rows()] == [row_seed(0, n) for n in range(10)]
    # Equal prompts are different rows.
    same = batch(artifact, ["w4 w5"] * 4, tmp_path / "same", **job)
    assert len({row["output"]["text"] for row in same.rows()}) > 1


def test_scores_of_a_text_file(artifact: Path, runtime: lmopt.Runtime, tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("w3 w4 w5\n\nw9 w8 w7 w6\r\n")
    found = batch(artifact, path, tmp_path / "out", task="score")
    rows = list(found.rows())
    assert [row["prompt"] for row in rows] == ["w3 w4 w5", "w9 w8 w7 w6"]
    for row in rows:
        alone = runtime.score(row["prompt"])
        np.testing.assert_allclose(row["output"]["logprobs"], alone, atol=1e-5)
        assert row["output"]["tokens"] == len(alone)
        assert row["output"]["logprob"] == pytest.approx(float(np.sum(alone)), abs=1e-4)


def test_bad_rows_go_to_the_errors_and_do_not_spoil_the_others(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = ['{"prompt": "w3 w4"}', "{broken", '{"prompt": [1, 9999]}', '{"prompt": [5]}', '{"x": 1}', "[1]"]
    lines += [
        json.dumps({"prompt": [3] * 500}),
        '{"prompt": 7}',
        '{"text": "w5", "output": 1}',
        '{"prompt": [1.5]}',
    ]
    lines += ['{"messages": [{"role": "user", "content": "w5"}]}', '{"prompt": [6, 7]}']
    path.write_text("\n".join(lines))
    found = batch(artifact, path, tmp_path / "out", max_new_tokens=3)
    assert [row["row"] for row in found.rows()] == [0, 3, 11]
    told = {row["row"]: row["error"]["type"] for row in found.error_rows()}
    assert told == {
        1: "JSONDecodeError", 2: "TokenIdError", 4: "InputError", 5: "InputError", 6: "ContextLengthError",
        7: "InputError", 8: "InputError", 9: "DtypeError", 10: "TemplateError",
    }  # fmt: skip
    assert found.rows_in == found.rows_out + found.errors == 12
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert (manifest["rows_in"], manifest["rows_out"], manifest["errors"]) == (12, 3, 9)


def test_rows_that_json_cannot_write_again_are_errors_and_no_end_of_the_job(
    artifact: Path, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    bad = ['{"prompt": [5], "x": NaN}', '{"prompt": [5], "x": [1e999]}', "[" * 100_000, '{"x": -Infinity}']
    path.write_text("\n".join(['{"prompt": [5]}', *bad, '{"prompt": [6]}']))
    found = batch(artifact, path, tmp_path / "out", max_new_tokens=2)
    assert [row["row"] for row in found.rows()] == [0, 5]
    told = list(found.error_rows())
    assert [row["row"] for row in told] == [1, 2, 3, 4]
    assert [row["input"] for row in told] == bad
    assert [row["error"]["type"] for row in told] == [
        "ValueError",
        "ValueError",
        "RecursionError",
        "ValueError",
    ]


def test_too_many_errors_stop_the_job_and_more_may_be_allowed(artifact: Path, tmp_path: Path) -> None:
    rows = [[5], [9999], [6], [9998], [7], [8]]
    job: dict[str, Any] = {"rows_per_shard": 2, "max_new_tokens": 2}
    with pytest.raises(TooManyErrorsError, match="2 rows failed, 1 may"):
        batch(artifact, rows, tmp_path / "out", max_errors=1, **job)
    assert len((tmp_path / "out" / "errors.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "out" / "manifest.json").exists()
    kept = (tmp_path / "out" / "part-00000.jsonl").stat()
    found = batch(artifact, rows, tmp_path / "out", max_errors=2, **job)
    assert (found.rows_out, found.errors, found.resumed_rows) == (4, 2, 2)
    assert found.shards[0].stat().st_ino == kept.st_ino
    assert found.shards[0].stat().st_mtime_ns == kept.st_mtime_ns


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"max_new_tokens": 3}, "task.options.max_new_tokens: 2 there, 3 asked"),
        ({"rows_per_shard": 5}, "rows_per_shard: 4 there, 5 asked"),
        ({"seed": 9}, "task.seed: 0 there, 9 asked"),
        ({"inputs": [[5, 6, 8]]}, "inputs: "),
        ({"dtype": "float32"}, "runtime.dtype"),
    ],
)
def test_another_job_in_the_same_folder_is_refused(
    artifact: Path, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    job: dict[str, Any] = {"inputs": [[5, 6, 7]], "rows_per_shard": 4, "max_new_tokens": 2}
    batch(artifact, output=tmp_path / "out", **job)
    again = batch(artifact, output=tmp_path / "out", workers=2, max_errors=3, **job)
    assert (again.rows_out, again.resumed_rows) == (1, 1)
    with pytest.raises(JobMismatchError, match=what):
        batch(artifact, output=tmp_path / "out", **{**job, **change})


def test_a_committed_shard_that_was_changed_is_noticed(artifact: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {"inputs": [[5, 6]] * 3, "rows_per_shard": 1, "max_new_tokens": 2}
    found = batch(artifact, output=tmp_path / "out", **job)
    content = found.shards[1].read_bytes()
    found.shards[1].write_bytes(content.replace(b"5", b"4", 1))
    with pytest.raises(CorruptArtifactError, match=r"part-00001\.jsonl"):
        batch(artifact, output=tmp_path / "out", **job)


def test_what_a_kill_left_half_written_in_the_journal_is_cut_off(artifact: Path, tmp_path: Path) -> None:
    rows, job = [[5], [9999], [7]], {"rows_per_shard": 1, "max_new_tokens": 2}
    with pytest.raises(TooManyErrorsError):
        batch(artifact, rows, tmp_path / "out", max_errors=0, **job)
    path = tmp_path / "out" / ".job" / "journal.jsonl"
    path.write_bytes(path.read_bytes() + b'{"shard": 1, "fi')
    found = batch(artifact, rows, tmp_path / "out", **job)
    assert (found.rows_out, found.errors, found.resumed_rows) == (2, 1, 1)


def test_folders_that_are_in_use_or_not_ours_are_left_alone(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactExistsError, match="mine"):
        batch(artifact, ROWS, tmp_path / "mine")
    with Ledger(tmp_path / "busy"), pytest.raises(LockTimeoutError, match="busy"):
        batch(artifact, ROWS, tmp_path / "busy")


def test_every_engine_works_inside_workers(tiny_model: lmopt.Model, tmp_path: Path) -> None:
    rows, job = [[5, 6, 7], [8, 9]], {"max_new_tokens": 4}
    # A live model: saved for torch, exported for onnxruntime.
    torch = batch(tiny_model, rows, tmp_path / "torch", backend="torch", **job)
    exported = batch(tiny_model, rows, tmp_path / "onnx", backend="onnxruntime", **job)
    assert list(torch.rows()) == list(exported.rows())
    own = lmopt.Model.from_module(tiny_lstm())
    with pytest.raises(UnsupportedError, match="backend='onnxruntime'"):
        batch(own, rows, tmp_path / "own", **job)
    assert batch(own, rows, tmp_path / "lstm", backend="onnxruntime", **job).rows_out == 2


def test_requests_that_make_no_sense_are_refused_before_any_work(artifact: Path, tmp_path: Path) -> None:
    for options in (
        {"task": "summarise"},
        {"engine": "spark"},
        {"workers": 0},
        {"rows_per_shard": 0},
        {"max_errors": -1},
        {"max_new_tokns": 4},
        {"task": "score", "max_new_tokens": 4},
        {"runtime": {"lock": threading.Lock()}},
    ):
        with pytest.raises(UnsupportedOptionError):
            batch(artifact, ROWS, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="input 1 is a int"):
        batch(artifact, ["w3", 4], tmp_path / "out")
    with pytest.raises(UnsupportedOptionError, match="no option 'spining'"):
        batch(artifact, ROWS, tmp_path / "spin", runtime={"spining": True})


def test_a_job_without_rows_is_a_job(artifact: Path, tmp_path: Path) -> None:
    found = batch(artifact, [], tmp_path / "out")
    assert (found.rows_in, found.rows_out, found.shards) == (0, 0, ())
