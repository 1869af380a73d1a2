"""What cannot be honoured is refused in OpenAI's form, and the field is named; nothing is silently ignored."""

import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

import lmopt
from lmopt.errors import TokenizerError, UnsupportedOptionError
from lmopt.serving import ServeLimits, create_app

Post = Callable[..., httpx.Response]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
COMPLETION = {"model": "tiny", "prompt": "w5 w6", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w7"}], "max_tokens": 2}


def refused(answer: httpx.Response, status: int, param: str | None, code: str | None = None) -> str:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["param"]) == (status, param), error
    assert code is None or error["code"] == code
    return str(error["message"])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["w5", 7]}, "prompt[1]"),
        ({"prompt": [[5, "6"]]}, "prompt[0]"),
        ({"prompt": [[5, True]]}, "prompt[0]"),
        ({"prompt": [5, 97]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "2"}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": [1]}, "presence_penalty"),
        ({"logit_bias": {"w5": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {"97": 1}}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "w9"}, "suffix"),
        ({"seed": "a"}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["w5", 6]}, "stop"),
        ({"stop": ["w5"] * 17}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
        ({"user": "me", "tools": []}, "tools"),
        ({"beam_width": 4}, "beam_width"),
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
    ],
    ids=repr,
)
def test_fields_of_completions(post: Post, change: dict[str, Any], param: str) -> None:
    assert len(refused(post(COMPLETIONS, {**COMPLETION, **change}), 400, param)) > 20


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "w7"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "w7"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "w7"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": "w7", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"store": True}, "store"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"prompt": "w5"}, "prompt"),
    ],
    ids=repr,
)
def test_fields_of_chats(post: Post, change: dict[str, Any], param: str) -> None:
    refused(post(CHATS, {**CHAT, **change}), 400, param)


def test_what_means_nothing_here_or_what_is_done_anyway_is_taken(post: Post) -> None:
    labels = {"user": "me", "temperature": None, "stop": None, "logit_bias": None, "seed": None}
    assert post(COMPLETIONS, {**COMPLETION, **labels, "best_of": 1, "suffix": ""}).status_code == 200
    anyway = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    anyway |= {"modalities": ["text"], "service_tier": "auto", "metadata": {"a": "b"}, "n": 1}
    assert post(CHATS, {**CHAT, **labels, **anyway}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"w5"',
        b"null",
        b"[" * 100_000,
        b'{"model": NaN}',
        b"\xff\xfe",
        b"{} {}",
        b"1" * 6000,
    ],
    ids=lambda body: repr(body[:16]),
)
def test_bodies_that_are_no_requests(post: Post, body: bytes) -> None:
    for path in (COMPLETIONS, CHATS):
        refused(post(path, body), 400, None, "invalid_json")


def test_another_content_type(post: Post) -> None:
    # What a web page may send to this machine without asking.
    refused(post(COMPLETIONS, COMPLETION, headers={"content-type": "text/plain"}), 415, None)


def test_what_is_too_long(post: Post, client: openai.OpenAI, runtime: lmopt.Runtime) -> None:
    context = runtime.facts.context_length
    assert context is not None
    for prompt in ([5] * (context - 1), "w5 " * (context + 5), [[5], [6] * context]):
        refused(post(COMPLETIONS, {**COMPLETION, "prompt": prompt}), 400, "prompt", "context_length_exceeded")
    long = [{"role": "user", "content": "w7 " * context}]
    refused(post(CHATS, {**CHAT, "messages": long}), 400, "messages", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            model="tiny", prompt=[5] * (context + 1), max_tokens=0, echo=True, logprobs=1
        )
    assert caught.value.code == "context_length_exceeded"


def test_unknown_models_and_paths(post: Post) -> None:
    refused(post(COMPLETIONS, {**COMPLETION, "model": "gpt-9"}), 404, "model", "model_not_found")
    refused(post("/v1/embeddings", {}), 404, None)
    refused(post("/v1/models", {}), 405, None)


def test_keys_and_sizes(runtime: lmopt.Runtime, start: Any) -> None:
    with (
        start(runtime, api_key="secret", max_body_bytes=300, body_timeout_s=0.3) as (address, _),
        httpx.Client(base_url=address, trust_env=False) as plain,
    ):
        key = {"authorization": "Bearer secret"}
        for headers in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
            refused(plain.post(COMPLETIONS, json=COMPLETION, headers=headers), 401, None, "invalid_api_key")
            assert plain.get("/v1/models", headers=headers).status_code == 401
            assert plain.get("/metrics", headers=headers).status_code == 401
        assert plain.get("/health").status_code == 200
        assert plain.post(COMPLETIONS, json=COMPLETION, headers=key).status_code == 200
        large = {**COMPLETION, "user": "x" * 300}
        refused(plain.post(COMPLETIONS, json=large, headers=key), 413, None, "request_too_large")

        def parts() -> Iterator[bytes]:
            for _ in range(40):
                yield b"x" * 10

        kind = {"content-type": "application/json"}
        refused(plain.post(COMPLETIONS, content=parts(), headers=key | kind), 413, None, "request_too_large")
        # A body that never arrives in full.
        where = urlsplit(address)
        lines = [f"POST {COMPLETIONS} HTTP/1.1", "host: x", "content-length: 200"]
        lines += [f"{name}: {value}" for name, value in {**key, **kind}.items()]
        with socket.create_connection((where.hostname or "", where.port or 0)) as raw:
            raw.sendall("\r\n".join(lines).encode() + b"\r\n\r\n{")
            assert raw.recv(4096).startswith(b"HTTP/1.1 408")
        assert plain.get("/health").status_code == 200


def test_models_without_a_tokenizer_and_limits_out_of_range_are_refused_at_once(
    runtime: lmopt.Runtime,
) -> None:
    with pytest.raises(UnsupportedOptionError, match="max_queue=-1"):
        ServeLimits(max_queue=-1)
    with pytest.raises(UnsupportedOptionError, match=r"max_tokens=1\.5"):
        ServeLimits(max_tokens=1.5)  # type: ignore[arg-type]
    kept, runtime.tokenizer = runtime.tokenizer, None
    try:
        with pytest.raises(TokenizerError, match="has no tokenizer"):
            create_app(runtime)
    finally:
        runtime.tokenizer = kept
