"""`run`, `chat`, `eval`: what a model says, on stdout, and nothing else there."""

import json
from pathlib import Path

import pytest

from lmopt.runtime import Runtime

PROMPT = "w5 w9 w33"


@pytest.fixture(scope="module")
def expected(tiny: str) -> list[str]:
    """Twelve greedy words of the tiny model."""
    with Runtime(tiny, backend="torch") as runtime:
        return runtime.generate(PROMPT, max_new_tokens=12, do_sample=False).text.split()


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_run_writes_the_new_text_alone(call, tiny, exported, expected, backend, stream) -> None:
    source = tiny if backend == "torch" else exported
    result = call("run", source, PROMPT, "--backend", backend, "--max-new-tokens", 12, stream)
    assert result.status == 0, result.stderr
    assert result.stdout.split() == expected
    assert "12 tokens in" in result.stderr


def test_run_reads_the_prompt_from_stdin(call, exported, expected) -> None:
    result = call("run", exported, "-", "--max-new-tokens", 12, stdin=PROMPT)
    assert result.stdout.split() == expected


def test_run_as_json(call, exported, expected) -> None:
    result = call("run", exported, PROMPT, "--max-new-tokens", 12, "--json")
    (one,) = result.data["generations"]
    assert result.data["ok"] is True
    assert one["text"].split() == expected
    assert one["prompt_tokens"] == 3
    assert one["finish_reason"] == "length"
    assert result.data["engine"]["backend"] == "onnxruntime"


def test_run_hands_on_every_option(call, exported, expected) -> None:
    same = (
        "--seed",
        7,
        "--temperature",
        1.3,
        "--top-k",
        20,
        "--top-p",
        0.9,
        "--max-new-tokens",
        12,
        "--json",
    )
    first, again = (call("run", exported, PROMPT, *same).data["generations"] for _ in range(2))
    assert first == again
    assert first[0]["seed"] == 7
    assert first[0]["text"].split() != expected
    stopped = call("run", exported, PROMPT, "--stop", expected[3], "--max-new-tokens", 12, "--json")
    assert stopped.data["generations"][0]["finish_reason"] == "stop_string"


def test_run_takes_any_other_field_by_set(call, exported) -> None:
    words = ("--set", "num_beams=3", "--set", "num_return_sequences=2", "--set", "early_stopping=True")
    result = call("run", exported, PROMPT, "--max-new-tokens", 5, *words)
    assert result.status == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2
    refused = call("run", exported, PROMPT, "--set", "num_beam=3")
    assert refused.status == 2
    assert "num_beams" in refused.stderr
    assert call("run", exported, PROMPT, "--set", "num_beams").status == 2


def test_run_stays_within_the_context(call, exported) -> None:
    result = call("run", exported, " ".join(["w7"] * 120), "--set", "eos_token_id=96", "--json")
    assert result.status == 0, result.stderr
    assert len(result.data["generations"][0]["token_ids"]) <= 8


def test_chat_on_a_pipe(call, exported) -> None:
    lines = ["w5", "/help", "w6 w7", "/reset", "w5", "/system w40", "w5", "/exit", "w8"]
    result = call("chat", exported, "--max-new-tokens", 6, "--json", stdin="\n".join(lines))
    assert result.status == 0, result.stderr
    first, second, after_reset, with_system = result.data
    assert first["role"] == "assistant"
    # Template: bos, then "role word ..." for each message.
    assert first["generation"]["prompt_tokens"] == 3
    assert second["generation"]["prompt_tokens"] > 3 + len(first["content"].split())
    assert after_reset["generation"] == first["generation"]
    assert with_system["generation"]["prompt_tokens"] == 5
    shown = call("chat", exported, "--max-new-tokens", 6, stdin="w5\n")
    assert shown.stdout.split() == first["content"].split()


def test_chat_stops_a_pipe_at_an_error(call, exported) -> None:
    result = call("chat", exported, stdin=" ".join(["w5"] * 200))
    assert result.status == 2
    assert "ContextLengthError" in result.stderr


def test_eval(call, exported, tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{n % 90}" for n in range(300)))
    words = ("--text", text, "--tokens", 200, "--context", 64, "--stride", 32)
    with Runtime(tiny, backend="torch") as runtime:
        expected = runtime.perplexity(text.read_text(), tokens=200, context=64, stride=32)
    result = call("eval", exported, *words, "--json")
    assert result.data["perplexity"]["value"] == pytest.approx(expected.value, rel=1e-4)
    assert result.data["perplexity"]["tokens"] == 200
    shown = call("eval", exported, *words).stdout
    assert f"perplexity {expected.value:.3f} +- " in shown
    assert call("eval", exported, "--text", tmp_path / "none.txt").status == 2


def test_libraries_that_print_do_not_reach_stdout(call, exported, monkeypatch) -> None:
    plain = Runtime.generate

    def noisy(self, *arguments, **options):
        print("a library says hello")  # noqa: T201
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Runtime, "generate", noisy)
    result = call("run", exported, PROMPT, "--json")
    assert json.loads(result.stdout)["ok"]
    assert "a library says hello" in result.stderr
