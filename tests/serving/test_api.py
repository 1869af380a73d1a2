"""OpenAI's own client gets, over HTTP, what the runtime gives in this process."""

import math
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import lmopt

PROMPT = "w5 w17 w40 w41"
IDS = [5, 17, 40, 41]
CHAT: list[Any] = [{"role": "user", "content": "w7 w8"}]
NO_END = {"ignore_eos": True}  # the tiny model may end at any token


def greedy(runtime: lmopt.Runtime, prompt: Any = PROMPT, tokens: int = 8, **options: Any) -> Any:
    return runtime.generate(
        prompt, do_sample=False, max_new_tokens=tokens, **{"eos_token_id": None, **options}
    )


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


def test_a_completion(client: openai.OpenAI, runtime: lmopt.Runtime) -> None:
    expected = greedy(runtime)
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, extra_body=NO_END
    )
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected.text, "length", 0)
    assert found.usage is not None
    count = expected.prompt_tokens
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (count, 8)
    assert found.usage.total_tokens == count + 8
    assert found.object == "text_completion"
    # Sixteen tokens where nobody says how many, as with OpenAI.
    found = client.completions.create(model="tiny", prompt=IDS, temperature=0, extra_body=NO_END)
    assert found.choices[0].text == greedy(runtime, IDS, 16).text


def test_several_prompts_each_with_its_choices(client: openai.OpenAI, runtime: lmopt.Runtime) -> None:
    prompts = [PROMPT, "w9", "w20 w21 w22"]
    for body in (prompts, [[int(word[1:]) for word in one.split()] for one in prompts]):
        found = client.completions.create(
            model="tiny", prompt=body, max_tokens=5, temperature=0, n=2, extra_body=NO_END
        )
        expected = greedy(runtime, body, 5)
        assert [one.text for one in found.choices] == [one.text for one in expected for _ in range(2)]
        assert [one.index for one in found.choices] == list(range(6))
        assert found.usage is not None
        assert found.usage.prompt_tokens == sum(one.prompt_tokens for one in expected)
        assert found.usage.completion_tokens == 30


def test_sampling_repeats_with_its_seed_and_is_the_runtimes(
    client: openai.OpenAI, runtime: lmopt.Runtime
) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "n": 3, "temperature": 1.3}
    how |= {"top_p": 0.9, "extra_body": NO_END}
    found = [client.completions.create(**how, seed=seed) for seed in (5, 5, -1, None)]
    texts = [tuple(one.text for one in each.choices) for each in found]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert len(set(texts[0])) == 3
    expected = runtime.generate(
        PROMPT, max_new_tokens=12, num_return_sequences=3, temperature=1.3, top_p=0.9, top_k=0, seed=5,
        eos_token_id=None,
    )  # fmt: skip
    assert list(texts[0]) == [one.text for one in expected]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_text_before_them(
    client: openai.OpenAI, runtime: lmopt.Runtime, stream: bool
) -> None:
    whole = greedy(runtime).text
    words = whole.split()
    stop = " ".join(words[3:5])
    how: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    found = client.completions.create(**how, stop=["w0w0", stop], stream=stream, extra_body=NO_END)
    if stream:
        pieces = [one.choices[0] for one in found]
        text, finish = "".join(one.text for one in pieces), pieces[-1].finish_reason
        assert [one.finish_reason for one in pieces[:-1]] == [None] * (len(pieces) - 1)
    else:
        text, finish = found.choices[0].text, found.choices[0].finish_reason
    assert finish == "stop"
    assert text == whole[: whole.index(stop)]


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI, runtime: lmopt.Runtime) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": [PROMPT, "w9"], "max_tokens": 9, "temperature": 0}
    pieces = list(
        client.completions.create(
            **how, stream=True, stream_options={"include_usage": True}, extra_body=NO_END
        )
    )
    texts = ["", ""]
    for piece in pieces[:-1]:
        assert piece.usage is None
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [one.text for one in greedy(runtime, [PROMPT, "w9"], 9)]
    assert len(pieces) > 10
    assert not pieces[-1].choices
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 18


def test_logprobs_of_a_completion(client: openai.OpenAI, runtime: lmopt.Runtime) -> None:
    expected = greedy(runtime, logprobs=3)
    how: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    found = client.completions.create(**how, logprobs=3, extra_body=NO_END).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx(expected.logprobs)
    assert [word.strip() for word in found.tokens or []] == expected.text.split()
    for top, known in zip(found.top_logprobs or [], expected.top_logprobs, strict=True):
        assert {int(word.strip()[1:]): value for word, value in top.items()} == pytest.approx(known)
    # Each token stands where its offset says.
    for token, offset in zip(found.tokens or [], found.text_offset or [], strict=True):
        assert expected.text[offset:].lstrip().startswith(token.strip())
    streamed = client.completions.create(**how, logprobs=3, stream=True, extra_body=NO_END)
    parts = [one.choices[0].logprobs for one in streamed]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        together = [value for part in parts if part is not None for value in getattr(part, name)]
        assert together == getattr(found, name)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(
    client: openai.OpenAI, runtime: lmopt.Runtime, max_tokens: int
) -> None:
    # What evaluation harnesses ask for: log-probabilities of a given text.
    (choice,) = client.completions.create(
        model="tiny",
        prompt=IDS,
        max_tokens=max_tokens,
        echo=True,
        logprobs=2,
        temperature=0,
        extra_body=NO_END,
    ).choices
    found = choice.logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.top_logprobs is not None
    assert found.top_logprobs[0] is None
    expected = runtime.score(IDS)
    assert isinstance(expected, np.ndarray)
    assert found.token_logprobs[1:4] == expected.tolist()
    assert len(found.token_logprobs) == 4 + max_tokens
    logits = runtime.logits(IDS)
    assert isinstance(logits, np.ndarray)
    for place in range(1, 4):
        top = found.top_logprobs[place]
        assert max(top, key=top.__getitem__).strip() == f"w{logits[place - 1].argmax()}"
        assert f"w{IDS[place]}" in {word.strip() for word in top}
    more = greedy(runtime, IDS, 1).text if max_tokens else ""
    assert choice.text == PROMPT + more
    assert choice.finish_reason == "length"


def test_echo_in_a_stream(client: openai.OpenAI, runtime: lmopt.Runtime) -> None:
    how: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "echo": True, "stream": True, "temperature": 0}
    for tokens, more in ((3, greedy(runtime, tokens=3).text), (0, "")):
        pieces = list(client.completions.create(**how, max_tokens=tokens, extra_body=NO_END))
        assert "".join(one.choices[0].text for one in pieces) == PROMPT + more
        assert pieces[-1].choices[0].finish_reason == "length"


def test_penalties_and_biases_change_the_scores_as_documented(
    client: openai.OpenAI, runtime: lmopt.Runtime
) -> None:
    seen: list[int] = []
    frequency, presence, bias = 1.1, 0.7, {30: 4.5, 31: -100.0}
    for _ in range(10):
        logits = runtime.logits([*IDS, *seen])
        assert isinstance(logits, np.ndarray)
        scores = logits[-1].astype(np.float64)
        for token in set(seen):
            scores[token] -= seen.count(token) * frequency + presence
        for token, value in bias.items():
            scores[token] += value
        seen.append(int(scores.argmax()))
    found = client.completions.create(
        model="tiny", prompt=IDS, max_tokens=10, temperature=0, frequency_penalty=frequency,
        presence_penalty=presence, logit_bias={str(token): int(v) if v == -100 else v for token, v in bias.items()},
        extra_body=NO_END,
    )  # fmt: skip
    assert found.choices[0].text.split() == [f"w{token}" for token in seen]
    assert found.choices[0].text != greedy(runtime, tokens=10).text


def test_a_chat(client: openai.OpenAI, runtime: lmopt.Runtime) -> None:
    expected = greedy(runtime, runtime.chat_ids(CHAT), 6)
    found = client.chat.completions.create(
        model="tiny", messages=CHAT, max_completion_tokens=6, temperature=0, extra_body=NO_END
    )
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(runtime.chat_ids(CHAT))
    pieces = list(
        client.chat.completions.create(
            model="tiny", messages=CHAT, max_tokens=6, temperature=0, stream=True, extra_body=NO_END
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in pieces) == expected.text
    assert pieces[-1].choices[0].finish_reason == "length"
    assert len({one.id for one in pieces}) == 1


def test_a_chat_without_a_limit_goes_on_to_its_end_or_that_of_the_context(
    client: openai.OpenAI, runtime: lmopt.Runtime
) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=CHAT, temperature=0, extra_body={"ignore_eos": True}
    )
    assert found.usage is not None
    assert found.usage.total_tokens == runtime.facts.context_length
    # The end-of-sequence token ends it, and is no text.
    eos = greedy(runtime, runtime.chat_ids(CHAT), 4).token_ids[3]
    assert runtime.generation_defaults["eos_token_id"] == 2
    expected = greedy(runtime, runtime.chat_ids(CHAT), 40, eos_token_id=2)
    found = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0, max_tokens=40)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == {"stop": "stop", "length": "length"}[expected.finish_reason]
    assert eos


def test_logprobs_of_a_chat(client: openai.OpenAI, runtime: lmopt.Runtime) -> None:
    expected = greedy(runtime, runtime.chat_ids(CHAT), 6, logprobs=2)
    how: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "temperature": 0}
    how |= {"logprobs": True, "top_logprobs": 2, "extra_body": NO_END}
    found = client.chat.completions.create(**how).choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert [one.logprob for one in found.content] == pytest.approx(expected.logprobs)
    for one, top in zip(found.content, expected.top_logprobs, strict=True):
        assert [each.logprob for each in one.top_logprobs] == pytest.approx(list(top.values()))
        assert bytes(one.bytes or []).decode() == one.token
    streamed = [one.choices[0].logprobs for one in client.chat.completions.create(**how, stream=True)]
    assert [one for part in streamed if part for one in part.content or []] == found.content


def test_messages_are_written_by_the_models_template(post: Callable[..., httpx.Response]) -> None:
    def said(messages: list[Any], **more: Any) -> str:
        body = {"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 0, **NO_END, **more}
        answer = post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    parts = [{"type": "text", "text": "w7 "}, {"type": "text", "text": "w8"}]
    assert said([{"role": "user", "content": parts}]) == said(CHAT)
    instructed = [{"role": "system", "content": "w9"}, *CHAT]
    assert said(instructed) == said([{"role": "developer", "content": "w9"}, *CHAT])
    assert said(instructed) != said(CHAT)
    assert said(CHAT, chat_template_kwargs={"mood": " w33 "}) != said(CHAT)


def test_health_and_metrics(server: str, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, extra_body=NO_END)
    assert httpx.get(f"{server}/health", trust_env=False).json() == {"status": "ok"}
    text = httpx.get(f"{server}/metrics", trust_env=False).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["lmopt_new_tokens_total"]) >= 30
    assert float(values['lmopt_http_answers_total{status="200"}']) >= 1
    assert float(values['lmopt_rows{state="running"}']) == 0
    low, high = (float(values[f'lmopt_inter_token_seconds{{quantile="{q}"}}']) for q in ("0.5", "0.99"))
    assert 0 < low <= high < math.inf
