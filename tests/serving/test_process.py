"""`lmopt serve` as a process: it listens where it says, keeps to itself, and stops well."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from lmopt.errors import UnsupportedOptionError
from lmopt.serving.server import bind


@contextmanager
def process(artifact: Path, *words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start `lmopt serve` on a free port; gives the process and its address."""
    command = [sys.executable, "-c", "from lmopt.cli import main; main()"]
    command += ["serve", str(artifact), "--port", "0", "--json", *words]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line, started.stderr.read() if started.stderr else ""
        yield started, json.loads(line)["address"]
    finally:
        started.kill()
        started.wait()
        for pipe in (started.stdout, started.stderr):
            assert pipe is not None
            pipe.close()


def listeners(pid: int) -> set[str]:
    """Addresses at which a process listens, as /proc spells them."""
    inodes = {os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].split(":")[0])
    return found


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(artifact: Path) -> None:
    with process(artifact, "--name", "tiny", "--threads", "1", LMOPT_API_KEY="secret") as (server, address):
        assert listeners(server.pid) == {"0100007F"}
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=address, api_key="other", max_retries=0).models.list()
        client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0)
        assert client.models.list(extra_headers={"host": "behind.a.proxy"}).data
        stream = client.completions.create(
            model="tiny", prompt=[5], max_tokens=120, temperature=0, stream=True, logprobs=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        pieces = [next(stream)]
        os.kill(server.pid, signal.SIGTERM)
        pieces += stream
        assert pieces[-1].choices[0].finish_reason == "length"
        assert (
            sum(len(one.choices[0].logprobs.tokens or []) for one in pieces if one.choices[0].logprobs) == 120
        )
        assert server.wait(20) == 0
        with pytest.raises(openai.APIConnectionError):
            openai.OpenAI(base_url=address, api_key="secret", max_retries=0).models.list()


def test_requests_that_do_not_finish_in_time_are_told_so(artifact: Path) -> None:
    # Rows that wait for their turn cannot finish at once.
    words = ("--name", "tiny", "--threads", "1", "--stop-timeout-s", "0", "--max-num-seqs", "1")
    with process(artifact, *words) as (server, address):
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        # Without a key only programs of this machine may call it, and no web page that gave its name our address.
        assert client.models.list().data
        with pytest.raises(openai.PermissionDeniedError, match=r"not called 'evil\.example'"):
            client.models.list(extra_headers={"host": "evil.example"})
        said: list[Any] = []

        def ask() -> None:
            try:
                client.completions.create(
                    model="tiny",
                    prompt=[[5]] * 100,
                    max_tokens=120,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
            except openai.APIStatusError as error:
                said.append((error.status_code, error.code))

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.5)
        os.kill(server.pid, signal.SIGINT)
        thread.join(20)
        assert said == [(503, "stopping")]
        assert server.wait(20) == 0


def test_an_address_that_cannot_be_had_is_told_before_the_model_is_loaded(artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnsupportedOptionError, match=f"port={port}"):
            bind("127.0.0.1", port)
    with pytest.raises(UnsupportedOptionError, match=r"127\.0\.0\.256"):
        bind("127.0.0.256", 0)
