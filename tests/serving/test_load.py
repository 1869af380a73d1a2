"""Requests of many clients share one batch, and none notices the others; what is too much is refused at once."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import lmopt
from lmopt.errors import EngineError

CLIENTS = 64


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Calls:
    """The runtime's engine, with its calls counted, slowed, or broken."""

    def __init__(self, engine: Any) -> None:
        self.inner = engine
        self.rows: list[int] = []
        self.before: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward(self, input_ids: Any, *arguments: Any, **options: Any) -> Any:
        self.rows.append(len(input_ids))
        self.before()
        return self.inner.forward(input_ids, *arguments, **options)


@pytest.fixture
def calls(runtime: lmopt.Runtime) -> Iterator[Calls]:
    """Watch the engine below the runtime."""
    guarded: Any = runtime._engine
    watched = Calls(guarded._engine)
    guarded._engine = watched
    yield watched
    guarded._engine = watched.inner


def requests(count: int) -> list[dict[str, Any]]:
    """Requests of all kinds, each with options of its own."""
    generator = np.random.default_rng(11)
    found = []
    for number in range(count):
        prompt = generator.integers(3, 97, generator.integers(1, 40)).tolist()
        one: dict[str, Any] = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": int(generator.integers(4, 40)),
        }
        one |= {
            "temperature": 0 if number % 2 else 1.2,
            "seed": number,
            "logprobs": 0,
            "extra_body": {"ignore_eos": number % 5 > 0},
        }
        if number % 4 == 1:
            one |= {"frequency_penalty": 1.0, "stop": ["w9", "w50 w"]}
        found.append(one)
    return found


def test_64_concurrent_streams_are_those_of_one_client_alone(
    server: str, client: openai.OpenAI, calls: Calls
) -> None:
    asked = requests(CLIENTS)
    alone = [client.completions.create(**one).choices[0] for one in asked]
    assert max(calls.rows) == 1
    calls.rows.clear()

    async def stream(plain: openai.AsyncOpenAI, one: dict[str, Any]) -> tuple[str, Any, list[Any]]:
        text, finish, logprobs = "", None, []
        async for piece in await plain.completions.create(**one, stream=True):
            (choice,) = piece.choices
            text, finish = text + choice.text, choice.finish_reason
            logprobs += choice.logprobs.token_logprobs if choice.logprobs else []
        return text, finish, logprobs

    async def all_at_once() -> list[tuple[str, Any, list[Any]]]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as plain:
            return await asyncio.gather(*(stream(plain, one) for one in asked))

    found = asyncio.run(all_at_once())
    # Log-probabilities, too, are the same bit by bit.
    assert found == [(one.text, one.finish_reason, one.logprobs.token_logprobs) for one in alone]
    assert len({one.finish_reason for one in alone}) == 2
    assert max(calls.rows) == 32  # one batch, as large as it may be


def test_more_than_there_is_room_for_is_refused_and_later_taken(
    artifact: Any, start: Any, runtime: lmopt.Runtime
) -> None:
    gate = threading.Event()
    with (
        lmopt.Runtime(artifact, threads=1, max_num_seqs=2) as narrow,
        start(narrow, max_queue=1) as (address, service),
    ):
        guarded: Any = narrow._engine
        guarded._engine = watched = Calls(guarded._engine)
        watched.before = gate.wait
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            how: dict[str, Any] = {
                "model": "tiny",
                "max_tokens": 4,
                "temperature": 0,
                "extra_body": {"ignore_eos": True},
            }
            texts: dict[int, str] = {}

            def ask(number: int) -> None:
                texts[number] = client.completions.create(prompt=[number], **how).choices[0].text

            threads = [threading.Thread(target=ask, args=(number,)) for number in (5, 6, 7)]
            for thread in threads:
                thread.start()
            wait_for(lambda: sum(service.batch.rows.values()) == 3)
            assert service.batch.rows == {"running": 2, "waiting": 1}
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(prompt=[8], **how)
            assert caught.value.status_code == 503
            assert caught.value.code == "overloaded"
            assert int(caught.value.response.headers["retry-after"]) >= 1
            gate.set()
            for thread in threads:
                thread.join(20)
            with pytest.raises(openai.BadRequestError, match="4 rows; this server holds 3"):
                client.completions.create(prompt=[8], n=4, **how)
            expected = runtime.generate(
                [[5], [6], [7], [8]], do_sample=False, max_new_tokens=4, eos_token_id=None
            )
            assert [texts[number] for number in (5, 6, 7)] == [one.text for one in expected[:3]]
            assert client.completions.create(prompt=[8], **how).choices[0].text == expected[3].text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_row_along(
    runtime: lmopt.Runtime, start: Any, calls: Calls, stream: bool
) -> None:
    calls.before = lambda: time.sleep(0.02)
    with start(runtime) as (address, service):
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        with httpx.Client(base_url=address, trust_env=False, timeout=0.3 if not stream else 10) as plain:
            if stream:
                with plain.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                    next(answer.iter_raw())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    plain.post("/v1/completions", json=body)
        wait_for(lambda: service.batch.rows == {"running": 0, "waiting": 0})
        made = service.batch.metrics.new_tokens
        assert 0 < made < 60
        assert not service.batch._inside
        # The others go on, and so do those that come.
        with httpx.Client(base_url=address, trust_env=False) as plain:
            answer = plain.post("/v1/completions", json={**body, "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] == 3


def test_an_engine_that_fails_ends_what_is_inside_and_nothing_else(
    runtime: lmopt.Runtime, start: Any, calls: Calls
) -> None:
    body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 30, "temperature": 0, "ignore_eos": True}

    def fail() -> None:
        if len(calls.rows) == 5:
            raise EngineError("the kernel broke")

    with start(runtime) as (address, service), httpx.Client(base_url=address, trust_env=False) as plain:
        calls.before = fail
        answer = plain.post("/v1/completions", json=body)
        assert answer.status_code == 500
        assert "the kernel broke" in answer.json()["error"]["message"]
        calls.rows.clear()
        lines = [
            line
            for line in plain.post("/v1/completions", json={**body, "stream": True}).text.splitlines()
            if line
        ]
        assert "the kernel broke" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        calls.before = lambda: None
        assert plain.post("/v1/completions", json=body).status_code == 200
        assert service.batch.rows == {"running": 0, "waiting": 0}


def test_a_closed_runtime_is_told(artifact: Any, start: Any) -> None:
    runtime = lmopt.Runtime(artifact, threads=1)
    with start(runtime) as (address, _), httpx.Client(base_url=address, trust_env=False) as plain:
        runtime.close()
        body = {"model": "tiny", "prompt": [5], "max_tokens": 2}
        assert plain.post("/v1/completions", json=body).status_code == 503
        assert plain.get("/health").status_code == 503
