"""`lmopt train` and `lmopt launch`."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmopt import Model

Call = Callable[..., SimpleNamespace]
MAIN = [sys.executable, "-c", "from lmopt.cli import main; main()"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    words = [" ".join(f"w{(7 * start + 3 * n) % 90 + 3}" for n in range(400)) for start in range(2)]
    for number, text in enumerate(words):
        (folder / f"{number}.txt").write_text(text)
    return sorted(folder.iterdir())


def options(texts: list[Path], out: Path) -> list[str]:
    """Arguments of a short training."""
    return [
        *(word for one in texts for word in ("--data", str(one))),
        *("--eval", str(texts[0]), "--output", str(out), "--max-steps", "6", "--learning-rate", "0.01"),
        *(
            "--block-size",
            "16",
            "--batch-size",
            "4",
            "--set",
            "lr_scheduler_type=cosine",
            "--set",
            "save_steps=4",
        ),
    ]


def test_a_folder_is_trained_and_the_result_can_be_loaded(
    call: Call, tiny: str, texts: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = call("train", tiny, *options(texts, out), "--json")
    assert result.status == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["ok"] is True
    assert told["steps"] == len(told["losses"]) == 6
    assert told["losses"][-1] < told["losses"][0]
    tokenizer = Model.from_pretrained(tiny).tokenizer
    assert tokenizer is not None
    tokens = sum(len(tokenizer.encode(one.read_text())) + 1 for one in texts)  # each text and its end
    assert told["corpus"] == {"documents": 2, "tokens": tokens, "blocks": math.ceil((tokens - 1) / 16)}
    assert told["config"]["lr_scheduler_type"] == "cosine"
    assert told["perplexity"] == told["evaluations"][-1]["perplexity"]["value"]
    assert Model.from_pretrained(told["model"]).tokenizer is not None
    assert (out / "loss.png").is_file()
    # The same command again has nothing left to do, and says so.
    again = call("train", tiny, *options(texts, out))
    assert again.status == 0, again.stderr
    assert "went on from the checkpoint of step 6" in again.stderr
    assert "held-out perplexity" in again.stdout
    assert "loss.png" in again.stdout
    anew = json.loads(call("train", tiny, *options(texts, out), "--no-resume", "--json").stdout)
    assert anew["resumed_from"] == 0
    assert anew["losses"] == told["losses"]


def test_what_is_wrong_is_said_without_a_traceback(
    call: Call, tiny: str, texts: list[Path], tmp_path: Path
) -> None:
    result = call("train", tiny, *options(texts, tmp_path), "--set", "learning_rat=1", "--json")
    assert result.status == 2
    assert "no option 'learning_rat'" in json.loads(result.stdout)["error"]["message"]
    result = call("train", tiny, *options(texts, tmp_path), "--block-size", "1000")
    assert result.status == 2
    assert "128 positions" in result.stderr
    assert "Traceback" not in result.stderr


def test_launch_trains_in_two_processes_and_one_of_them_speaks(
    tiny: str, texts: list[Path], tmp_path: Path
) -> None:
    done = subprocess.run(
        [*MAIN, "launch", "--nproc", "2", "--", "train", tiny, *options(texts, tmp_path / "out"), "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["processes"] == 2
    assert told["steps"] == 6
    assert Model.from_pretrained(told["model"]).facts.vocab_size == 97
