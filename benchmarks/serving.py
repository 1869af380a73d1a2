"""What HTTP costs: eight concurrent streams of clients, against the runtime's own batch of the same prompts.

    python benchmarks/serving.py [MODEL] [--backend NAME] [--streams 8] [--rounds 5] [--json FILE]

MODEL is whatever `lmopt.Runtime` opens (default: SmolLM2-135M, fetched as by `lmopt demo`). Both ways use one runtime
in one process, in turn: `Runtime.generate` with all prompts in one call, and `lmopt.serving` under uvicorn with one
connection a prompt. The clients are another process on the same processors, which only notes when bytes come; what
it costs them is part of the figure. A figure is new tokens over the whole time, prompts and connections included.
Texts that differ between the two ways are counted: there must be none.
"""

import argparse
import asyncio
import functools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from harness.texts import Workload

import lmopt
from lmopt.artifact import cache_folder
from lmopt.cli.assets import fetch_smollm2
from lmopt.evaluation import Figure
from lmopt.evaluation.speed import random_prompts
from lmopt.generation import GenerationConfig
from lmopt.platform import machine
from lmopt.serving import create_app


class _Stream(asyncio.Protocol):
    """One connection: sends a request, and notes what comes back when."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.parts: list[tuple[float, bytes]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.parts.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.done.set_result(None)

    def tokens(self, began: float) -> dict[str, Any]:
        """Text, tokens, and seconds from the start to each piece of text."""
        text, stamps, count, rest = "", [], 0, b""
        for at, data in self.parts:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue  # headers, sizes of chunks, the end
                event = json.loads(line[6:])
                text += "".join(choice["text"] for choice in event["choices"])
                if any(choice["text"] for choice in event["choices"]):
                    stamps.append(at - began)
                count = event["usage"]["completion_tokens"] if event["usage"] else count
        return {"text": text, "stamps_s": stamps, "tokens": count}


async def _ask(port: int, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    streams = []
    for body in bodies:
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n"
        request = head.encode() + b"content-type: application/json\r\n\r\n" + data
        _, stream = await loop.create_connection(functools.partial(_Stream, request), "127.0.0.1", port)
        streams.append(stream)
    await asyncio.gather(*(stream.done for stream in streams))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "streams": [stream.tokens(began) for stream in streams]}


def client() -> None:
    """Ask as often as a line of JSON comes in: the clients' process."""
    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.write(json.dumps(asyncio.run(_ask(order["port"], order["bodies"]))) + "\n")
        sys.stdout.flush()


@contextmanager
def served(runtime: lmopt.Runtime) -> Iterator[int]:
    """Serve a runtime from a thread of this process; gives the port."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(create_app(runtime, name="model"), port=0, log_level="warning", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def run(
    runtime: lmopt.Runtime, *, streams: int, prompt_tokens: int, new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Measure both ways.

    Args:
        runtime: Open runtime.
        streams: Prompts, each with a client of its own.
        prompt_tokens: Of the longest prompt.
        new_tokens: New tokens of each.
        rounds: Rounds that count; one more warms up.

    Returns:
        `http`, `batch` (`Figure`s of total tokens/s), `ratio` (of each round), `gap_ms` (50th and 99th percentile of
        the time between two pieces of a stream, at the client), `batch_gap_ms` (the same between the tokens of a row,
        in this process), `first_ms` (to the first piece), `texts_that_differ`.
    """
    config = GenerationConfig(max_new_tokens=new_tokens)
    lengths = Workload("", prompt_tokens, new_tokens, streams).lengths
    figures: dict[str, list[float]] = {"http": [], "batch": []}
    gaps: dict[str, list[float]] = {"http": [], "batch": []}
    firsts: list[float] = []
    differ = 0
    clients = subprocess.Popen(
        [sys.executable, __file__, "--client"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert clients.stdin is not None
    assert clients.stdout is not None
    with served(runtime) as port:
        for number in range(rounds + 1):
            prompts = [row.tolist() for row in random_prompts(runtime.facts, lengths, seed=number)]
            texts: dict[str, list[str | None]] = {}
            for way in ("http", "batch") if number % 2 else ("batch", "http"):
                if way == "batch":
                    stamps: list[list[float]] = [[] for _ in prompts]
                    began = time.perf_counter()
                    found = runtime.generate(
                        prompts,
                        config,
                        on_token=lambda token, into=stamps: into[token.prompt].append(time.perf_counter()),
                    )
                    seconds = time.perf_counter() - began
                    texts[way] = [one.text for one in found]
                else:
                    body = {"model": "model", "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
                    body |= {"stream": True, "stream_options": {"include_usage": True}}
                    bodies = [{**body, "prompt": prompt} for prompt in prompts]
                    clients.stdin.write(json.dumps({"port": port, "bodies": bodies}) + "\n")
                    clients.stdin.flush()
                    said = json.loads(clients.stdout.readline())
                    assert all(one["tokens"] == new_tokens for one in said["streams"])
                    stamps = [one["stamps_s"] for one in said["streams"]]
                    seconds = said["seconds"]
                    texts[way] = [one["text"] for one in said["streams"]]
                if number:
                    figures[way].append(streams * new_tokens / seconds)
                    gaps[way] += [gap for row in stamps for gap in np.diff(row).tolist()]
                    if way == "http":
                        firsts += [row[0] for row in stamps]
            differ += sum(a != b for a, b in zip(texts["http"], texts["batch"], strict=True))
    clients.stdin.close()
    clients.wait()
    return {
        **{way: asdict(Figure.of(values)) for way, values in figures.items()},
        "ratio": asdict(Figure.of([a / b for a, b in zip(figures["http"], figures["batch"], strict=True)])),
        "gap_ms": _percentiles_ms(gaps["http"]),
        "batch_gap_ms": _percentiles_ms(gaps["batch"]),
        "first_ms": _percentiles_ms(firsts),
        "texts_that_differ": differ,
        "texts": streams * (rounds + 1),
    }


def _percentiles_ms(seconds: list[float]) -> dict[str, float]:
    return {f"p{share}": float(np.percentile(seconds, share)) * 1e3 for share in (50, 99)}


def main() -> None:
    """Measure, and print the figures or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M, fetched as by `lmopt demo`")
    parser.add_argument("--backend", help="default: as `lmopt.Runtime` chooses")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.client:
        client()
        return
    with lmopt.Runtime(asked.model or fetch_smollm2(cache_folder()), backend=asked.backend) as runtime:
        found = run(
            runtime,
            streams=asked.streams,
            prompt_tokens=asked.prompt_tokens,
            new_tokens=asked.new_tokens,
            rounds=asked.rounds,
        )
        report = runtime.report().actual
    print(f"{asked.streams} streams over HTTP: {Figure(**found['http'])} tokens/s in all")
    print(f"the runtime's own batch: {Figure(**found['batch'])} tokens/s")
    print(f"ratio: {Figure(**found['ratio'])}; median (least .. most) of {asked.rounds} rounds")
    for name, words in (
        ("gap_ms", "between pieces, at the client"),
        ("batch_gap_ms", "between tokens, without HTTP"),
    ):
        print(f"{words}: p50 {found[name]['p50']:.1f} ms, p99 {found[name]['p99']:.1f} ms")
    print(f"to the first piece: p50 {found['first_ms']['p50']:.0f} ms, p99 {found['first_ms']['p99']:.0f} ms")
    print(f"texts that differ: {found['texts_that_differ']} of {found['texts']}")
    print(f"{report.backend}, {report.dtype}, {report.threads} threads; {machine()}")
    if asked.json:
        result = {"machine": machine(), "backend": report.backend, "dtype": report.dtype, **found}
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
