"""`lmopt eval --canaries`, and `lmopt batch`, from the command line."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lmopt.cli.app import app


def call(*words: Any) -> tuple[int, dict[str, Any], str]:
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    return done.exit_code, json.loads(done.stdout) if done.stdout.startswith("{") else {}, done.stderr


def test_exposures_of_a_file(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text('{"template": "w4 w{}", "secret": "7"}\n\n{"template": "w{}", "secret": "12"}\n')
    status, found, _ = call("eval", tiny, "--canaries", path)
    assert status == 0
    first, second = found["exposures"]
    assert (first["space"], first["candidates"], first["method"]) == (10, 9, "exact")
    assert (second["space"], second["candidates"]) == (100, 99)
    assert 0 <= first["bits"] <= 3.33
    path.write_text('{"template": "w{}", "secret": "7", "other": 1}\n')
    status, found, _ = call("eval", tiny, "--canaries", path)
    assert (status, found["error"]["type"]) == (2, "InputError")
    assert call("eval", tiny)[0] == 2


def test_a_corpus_job_and_its_second_call(exported: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": 1, "prompt": "w4 w5"}\n{"id": 2}\n{"id": 3, "prompt": "w6"}\n')
    words = ("batch", exported, path, tmp_path / "out", "--max-new-tokens", 3, "--rows-per-shard", 2)
    status, found, errors = call(*words)
    assert status == 0
    assert "1 rows failed" in errors
    assert {"rows_in": 3, "rows_out": 2, "errors": 1, "resumed_rows": 0}.items() <= found["batch"].items()
    lines = [
        json.loads(one) for part in found["batch"]["shards"] for one in Path(part).read_text().splitlines()
    ]
    assert [one["id"] for one in lines] == [1, 3]
    assert call(*words)[1]["batch"]["resumed_rows"] == 3
    status, found, _ = call(*words, "--seed", 4)
    assert (status, found["error"]["type"]) == (2, "JobMismatchError")
    status, found, _ = call("batch", exported, path, tmp_path / "strict", "--max-errors", 0)
    assert (status, found["error"]["type"]) == (2, "TooManyErrorsError")
