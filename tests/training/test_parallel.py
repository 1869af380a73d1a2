"""Two processes train one model; one that dies is named, and nothing is lost but the steps since the checkpoint."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from lmopt import Model
from lmopt.errors import UnsupportedOptionError
from lmopt.testing.models import tiny_llama, tiny_lstm
from lmopt.training import TrainingConfig, TrainingResult, train
from lmopt.training.checkpointing import list_checkpoints
from lmopt.training.launching import launch

WORKER = Path(__file__).with_name("worker.py")
Ids = NDArray[np.int64]
LSTM: dict[str, Any] = {
    "model": "tiny_lstm",
    "config": {
        "learning_rate": 0.01,
        "max_steps": 8,
        "block_size": 16,
        "eval_steps": 4,
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "carry_state": True,
    },
}


def start(out: Path, task: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    """Run the worker by `lmopt launch`."""
    words = json.dumps({**task, "out": str(out)})
    head = [sys.executable, "-c", "from lmopt.cli import main; main()", "launch", *options, "--"]
    return subprocess.run(
        [*head, str(WORKER), words], capture_output=True, text=True, timeout=240, check=False
    )


def told(out: Path, rank: int = 0) -> dict[str, Any]:
    """Read what a worker wrote down."""
    found: dict[str, Any] = json.loads((out / f"rank-{rank}.json").read_text())
    return found


def alone_with(config: dict[str, Any], module: nn.Module, ids: Ids) -> TrainingResult:
    """Train in this process."""
    return train(Model.from_module(module), ids, evaluation=ids[:300], config=TrainingConfig(**config))


def same_story(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether losses, perplexities and weights are equal bit by bit."""
    return all(one[name] == other[name] for name in ("losses", "evaluations", "weights", "tokens"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes on the LSTM, not interrupted."""
    out = tmp_path_factory.mktemp("pair")
    done = start(out, LSTM, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    return out


def test_two_processes_are_one_with_the_doubled_batch(pair: Path, ids: Ids) -> None:
    one = alone_with({**LSTM["config"], "per_device_train_batch_size": 4}, tiny_lstm(), ids)
    two = told(pair)
    assert (one.processes, two["processes"]) == (1, 2)
    assert two["losses"] == pytest.approx(one.losses, rel=1e-5)
    assert two["tokens"] == one.tokens == 8 * 8 * 16
    assert two["perplexity"] == pytest.approx(one.perplexity, rel=1e-5)
    assert same_story(told(pair, 1), two)


def test_nothing_but_the_loopback_interface_is_listened_on(pair: Path) -> None:
    for rank in (0, 1):
        addresses = json.loads((pair / f"listening-{rank}.json").read_text())
        assert addresses
        assert set(addresses) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_sharded_weights_train_as_whole_ones_do_and_are_resumed(ids: Ids, tmp_path: Path) -> None:
    config = {"learning_rate": 0.01, "max_steps": 4, "block_size": 16, "eval_steps": 2, "save_steps": 2}
    config |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "sharding": "full"}
    task = {"model": "tiny_llama", "config": config, "keep": True, "kill": [[1, 2]]}
    done = start(tmp_path, task, "--nproc", "2", "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    alone = alone_with({**config, "sharding": "none", "per_device_train_batch_size": 4}, tiny_llama(), ids)
    sharded = told(tmp_path)
    assert sharded["resumed_from"] == 2
    assert sharded["losses"] == pytest.approx(alone.losses, rel=1e-5)
    assert sharded["perplexity"] == pytest.approx(alone.perplexity, rel=1e-4)
    assert same_story(told(tmp_path, 1), sharded)
    assert sharded["shares"]
    assert all(share <= 0.51 for share in sharded["shares"])
    assert Model.from_pretrained(tmp_path / "run" / "model").fingerprint() == sharded["weights"]


def test_a_killed_worker_is_named_and_the_run_goes_on_from_its_checkpoint(pair: Path, tmp_path: Path) -> None:
    # Rank 1 dies in step 4, all begin again from the checkpoint of step 2; rank 0 dies in step 7: no restart is left.
    task = {**LSTM, "keep": True, "kill": [[1, 3], [0, 6]]}
    done = start(tmp_path, task, "--nproc", "2", "--max-restarts", "1")
    assert done.returncode == 2
    assert "WorkerDiedError: rank 0 of 2" in done.stderr
    assert "killed by SIGKILL" in done.stderr
    died = max((tmp_path / f"killed-{step}").stat().st_mtime for step in (3, 6))
    # It takes about a second; a process that waits for a dead one would take half an hour.
    assert time.time() - died < 120
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [step for step, _ in list_checkpoints(checkpoints)] == [4, 6]
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "rank-1.json").exists()
    done = start(tmp_path, task, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert told(tmp_path)["resumed_from"] == 6
    assert same_story(told(tmp_path), told(pair))
    # Nothing that the killed ones had begun to write is left.
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000006", "step-00000008"]


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UnsupportedOptionError, match="nproc=0"):
        launch(["train"], nproc=0)
    with pytest.raises(UnsupportedOptionError, match="0 words"):
        launch([], nproc=2)
