"""A tiny exported model with a tokenizer and a chat template, behind a real server on this machine."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

import lmopt
from lmopt.serving import ServeLimits, create_app
from lmopt.testing.models import VOCAB_SIZE, tiny_llama

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
    "{% if mood is defined %}{{ mood }}{% endif %}{% if add_generation_prompt %}w50{% endif %}"
)


def save_tiny(folder: Path) -> Path:
    """Save the tiny Llama as a Hugging Face folder whose words are `w0 .. w96`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    tiny_llama().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama for ONNX Runtime, whose rows are the same, bit for bit, in any batch."""
    folder = tmp_path_factory.mktemp("serving")
    model = lmopt.Model.from_pretrained(save_tiny(folder / "model"))
    lmopt.Exporter("onnx", target="onnxruntime").export(model, folder / "tiny")
    return folder / "tiny"


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Run an application under uvicorn in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """Start a server of a runtime: `with start(runtime, max_queue=1) as (address, service)`."""

    @contextmanager
    def started(runtime: lmopt.Runtime, *, api_key: str | None = None, **limits: Any) -> Iterator[Any]:
        app = create_app(runtime, name="tiny", limits=ServeLimits(**limits), api_key=api_key)
        with serving(app) as address:
            yield address, app.state.service

    return started


@pytest.fixture(scope="session")
def runtime(artifact: Path) -> Iterator[lmopt.Runtime]:
    """The model, opened here; what a server of it says can be held against it."""
    with lmopt.Runtime(artifact, threads=1) as runtime:
        yield runtime


@pytest.fixture(scope="session")
def server(runtime: lmopt.Runtime, start: Any) -> Iterator[str]:
    """Address of a server with room for everybody."""
    with start(runtime) as (address, _):
        yield address


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def post(server: str) -> Iterator[Callable[..., httpx.Response]]:
    """Send any body to a path."""
    with httpx.Client(base_url=server, trust_env=False) as plain:

        def send(path: str, body: Any = None, **how: Any) -> httpx.Response:
            if not isinstance(body, bytes):
                body = json.dumps(body).encode()
            headers = {"content-type": "application/json", **how.pop("headers", {})}
            return plain.post(path, content=body, headers=headers, **how)

        yield send
