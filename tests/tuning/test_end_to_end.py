"""One real search of a tiny model: real processes, exports, engines, files; then the recommendation made again."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import lmopt
from lmopt.artifact import Artifact
from lmopt.compression import Quantize
from lmopt.testing.models import VOCAB_SIZE, tiny_llama
from lmopt.tuning import Workload, replay, tune

WORK = Workload(prompt_tokens=8, new_tokens=4, rounds=1, starts=1, score_tokens=256, quick_tokens=64)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a Hugging Face folder whose words are `w0 .. w96`."""
    folder = tmp_path_factory.mktemp("real") / "model"
    tiny_llama().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)
    return folder


def test_a_real_search_and_its_replay(real: Path, tmp_path: Path, text: Path) -> None:
    result = tune(
        real,
        output=tmp_path / "out",
        text=text,
        constraints={"kl_mean": 0.05},
        objectives=["size"],
        # 2 bits lose far too much, which a few tokens show.
        recipes={
            "two": Quantize(bits=2, group_size=32, head=2, embedding=2),
            "eight": Quantize(bits=8, group_size=32),
        },
        only_recipes=True,
        backends=["onnxruntime"],
        threads=[1],
        budget=600,
        workload=WORK,
    )
    states = {one.recipe: one.state for one in result.trials}
    reasons = {one.name: (one.state, one.reason) for one in result.trials}
    assert states == {"float": "measured", "two": "screened", "eight": "measured"}, reasons
    eight = next(one for one in result.trials if one.recipe == "eight")
    assert 0 < eight.loss["kl_mean"] < 0.05
    assert eight.peak_memory_bytes > 20e6
    best = result.best
    assert best is not None
    assert (result.folder / "report.html").stat().st_size > 10_000
    artifact = Artifact.open(result.artifact)
    assert artifact.manifest["parity"]["onnx"]["ok"]
    with lmopt.Runtime(result.artifact, backend=best.backend, threads=best.threads) as runtime:
        assert np.isfinite(runtime.logits("w3 w4 w5")).all()
    if not best.is_float:
        assert artifact.manifest["recipe"]["steps"] == [dict(one) for one in best.steps]
    again = replay(result, tmp_path / "again", starts=1)
    assert again.same_machine
    assert Artifact.open(again.artifact).manifest["recipe"] == artifact.manifest["recipe"]
    assert again.trial.loss["kl_mean"] == pytest.approx(best.loss["kl_mean"], rel=0.2, abs=1e-6)
