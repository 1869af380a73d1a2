"""`LmoptLM` gives what the harness's own class gives for transformers, on every engine."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

import lmopt
from lmopt.errors import (
    ContextLengthError,
    InputError,
    TokenizerError,
    UnsupportedOptionError,
)
from lmopt.interop.lm_eval import LmoptLM

LONG = "the old house by the sea " * 20


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


PAIRS = requests(
    "loglikelihood",
    ("the cat sat on the", " mat"),
    ("the cat sat on the", " dog ran to the door"),
    ("the cat sat on the", " mat"),  # asked twice
    ("the cat sat on the ", "mat"),  # the space belongs to the word
    ("", "the dog"),  # no context: BOS stands there
    ("", "<s>the dog"),  # ... but not twice
    ("<s>the cat", " dog"),
    ("東京の café", " 🙂 ist schön"),
    (LONG, " and the dog"),  # cut from the left
    (LONG, " and the dog ran to the door of the old house"),
    ("a", "b"),
    *(("the door of the", word) for word in (" old", " sea", " house", " mat by the sea", " cat")),
)


@pytest.fixture(scope="module")
def ours(runtime) -> LmoptLM:
    return LmoptLM(runtime=runtime, batch_size=3)


def test_loglikelihood(ours, theirs) -> None:
    expected = theirs.loglikelihood(PAIRS, disable_tqdm=True)
    found = ours.loglikelihood(PAIRS)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_two_requests_whose_tokens_are_cut_at_different_places(ours, theirs, monkeypatch) -> None:
    """One is `<s> | the dog`, the other `<s>the | dog`.

    By default `HFLM` 0.4.13 keeps logits by all tokens but the last, takes both for one, and scores the second at the
    place of the first's beginning. Without that cache it agrees with us.
    """
    asked = requests("loglikelihood", ("", "the dog"), ("<s>the", " dog"))
    found = [one for one, _ in ours.loglikelihood(asked)]
    monkeypatch.setattr(theirs, "logits_cache", False)
    assert found == pytest.approx(
        [one for one, _ in theirs.loglikelihood(asked, disable_tqdm=True)], abs=1e-4
    )


def test_the_greedy_flag_is_true_for_what_greedy_decoding_writes(ours, theirs) -> None:
    written = ours.generate_until(requests("generate_until", ("the cat", {"max_gen_toks": 6, "until": []})))
    asked = requests("loglikelihood", ("the cat", written[0]), ("the cat", written[0] + "x"))
    # Only where the text comes back as the same tokens.
    assert ours.loglikelihood(asked) == [
        (pytest.approx(total, abs=1e-4), greedy)
        for total, greedy in theirs.loglikelihood(asked, disable_tqdm=True)
    ]
    tokens = list(ours.runtime.generate("the cat", max_new_tokens=4, do_sample=False).token_ids)
    context = ours.tok_encode("the cat")
    answers = ours._loglikelihood_tokens(
        [(("", ""), context, tokens), (("", ""), context, [*tokens[:3], tokens[3] - 1])]
    )
    assert [greedy for _, greedy in answers] == [True, False]


def test_loglikelihood_rolling(ours, theirs) -> None:
    texts = requests(
        "loglikelihood_rolling", (LONG,), ("the cat",), ("café 東京 🙂",), ("<s>the dog",), (LONG * 2,)
    )
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert len(ours.tok_encode(LONG * 2)) > 2 * ours.max_length, "the long text must need several windows"


def test_generate_until(ours, theirs) -> None:
    asked = requests(
        "generate_until",
        ("the cat sat", {"until": ["\n"], "max_gen_toks": 10}),
        ("the dog ran to", {"until": ["\n"], "max_gen_toks": 10}),
        ("東京 🙂", {"until": "the", "max_gen_toks": 12}),
        ("the", {"max_new_tokens": 5, "do_sample": False, "temperature": 0.0}),
        (LONG, {"until": [], "max_gen_toks": 8}),  # cut from the left
        ("the old", {"until": ["e", "a", "o", "t", " "], "max_gen_toks": 12}),
    )
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked) == expected
    assert any(expected)


def test_a_stop_string_must_lie_in_what_was_generated(ours) -> None:
    """Where it would begin in the prompt, lmopt and transformers by themselves stop, the harness does not."""
    (free,) = ours.generate_until(requests("generate_until", ("the cat", {"until": [], "max_gen_toks": 8})))
    assert len(free) > 2
    border = "t" + free[0]
    found = ours.generate_until(
        requests("generate_until", ("the cat", {"until": [border], "max_gen_toks": 8}))
    )
    assert found == [free.partition(border)[0]]
    inside = free[1:3]
    found = ours.generate_until(
        requests("generate_until", ("the cat", {"until": [inside], "max_gen_toks": 8}))
    )
    assert found == [free.partition(inside)[0]]


def test_generation_ends_with_the_stop_string(ours) -> None:
    calls = []
    engine = ours.runtime.engine
    real = engine.forward

    def counted(*args, **options):
        calls.append(1)
        return real(*args, **options)

    (free,) = ours.generate_until(requests("generate_until", ("the cat", {"until": [], "max_gen_toks": 40})))
    engine.forward = counted
    try:
        ours.generate_until(
            requests("generate_until", ("the cat", {"until": [free[:1]], "max_gen_toks": 40}))
        )
    finally:
        del engine.forward
    assert len(calls) < 10


def test_tokens_are_those_of_the_harness(ours, theirs) -> None:
    assert ours.max_length == theirs.max_length == 96
    assert ours.eot_token_id == theirs.eot_token_id
    assert ours.prefix_token_id == theirs.prefix_token_id
    for text in ("the cat", "<s>the cat", "", "東京 🙂"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_chat_templates_are_those_of_the_harness(ours, theirs) -> None:
    chat = [{"role": "user", "content": "the cat "}, {"role": "assistant", "content": "sat on "}]
    for messages in (chat, [{"role": "system", "content": "the sea"}, *chat]):
        for prompt in (True, False):
            assert ours.apply_chat_template(messages, prompt) == theirs.apply_chat_template(messages, prompt)
    assert ours.chat_template(True) == theirs.chat_template(True)


def test_bad_requests_are_named(ours) -> None:
    with pytest.raises(InputError, match="empty continuation"):
        ours.loglikelihood(requests("loglikelihood", ("the cat", "")))
    with pytest.raises(ContextLengthError, match="continuation has"):
        ours.loglikelihood(requests("loglikelihood", ("the cat", LONG)))
    with pytest.raises(ContextLengthError, match="max_gen_toks"):
        ours.generate_until(requests("generate_until", ("the cat", {"max_gen_toks": 96})))
    with pytest.raises(UnsupportedOptionError, match="no_such"):
        ours.generate_until(requests("generate_until", ("the cat", {"no_such": 1, "max_gen_toks": 4})))


def test_what_cannot_be_opened(runtime) -> None:
    with pytest.raises(InputError, match="--model_args path="):
        LmoptLM()
    with pytest.raises(UnsupportedOptionError, match="batch_size"):
        LmoptLM(runtime=runtime, batch_size="many")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        LmoptLM(runtime=SimpleNamespace(tokenizer=None))


def test_a_recurrent_model_of_unequal_rows(tiny: Path) -> None:
    """Engines that take only equal rows, and have no context limit: batched as one by one."""
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(300, 16)
            self.lstm = nn.LSTM(16, 16, batch_first=True)
            self.head = nn.Linear(16, 300)

        def forward(self, input_ids, state=None):
            hidden, state = self.lstm(self.embedding(input_ids), state)
            return self.head(hidden), state

    import torch

    torch.manual_seed(0)
    model = lmopt.Model.from_module(Recurrent(), tokenizer=lmopt.Tokenizer.from_folder(tiny))
    with lmopt.Runtime(model, backend="torch") as runtime:
        many = LmoptLM(runtime=runtime, batch_size=8).loglikelihood(PAIRS)
        single = [LmoptLM(runtime=runtime, batch_size=1).loglikelihood([one])[0] for one in PAIRS]
        written = LmoptLM(runtime=runtime).generate_until(
            requests("generate_until", ("the cat", {"max_gen_toks": 4}), ("the", {"max_gen_toks": 4}))
        )
    assert [one for one, _ in many] == pytest.approx([one for one, _ in single], abs=1e-4)
    assert [greedy for _, greedy in many] == [greedy for _, greedy in single]
    assert len(written) == 2


def test_the_harness_s_own_command_line_knows_the_model(tiny: Path, tasks: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lmopt.interop.harness", "run", "--model", "lmopt"),
            *("--model_args", f"path={tiny},backend=torch", "--tasks", "own_lastword"),
            *("--include_path", str(tasks), "--output_path", str(tmp_path / "results")),
        ],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "own_lastword" in done.stdout
    assert list((tmp_path / "results").rglob("results_*.json"))
