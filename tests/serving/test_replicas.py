"""The same application in two replicas of Ray Serve."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, threading
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
from lmopt.serving import ServeLimits, deployment
app = deployment(sys.argv[1], replicas=2, name="tiny", limits=ServeLimits(max_queue=8))
import ray
from ray import serve
ray.init(address="local", num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(app, route_prefix="/")
import httpx, openai
address = f"http://127.0.0.1:{sys.argv[2]}"
client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
texts = [None] * 12
def ask(number):
    stream = client.completions.create(
        model="tiny", prompt=[number + 5, 9], max_tokens=20, temperature=0, stream=True,
        extra_body={"ignore_eos": True})
    texts[number] = "".join(piece.choices[0].text for piece in stream)
threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
[one.start() for one in threads]; [one.join() for one in threads]
try:
    client.completions.create(model="tiny", prompt=[5], max_tokens=10**6)
except openai.BadRequestError as error:
    param = error.param
served = set()
while len(served) < 2:
    served.add(httpx.get(address + "/metrics", trust_env=False).text)
counts = [float(l.split()[1]) for text in served for l in text.splitlines() if l.startswith("lmopt_new_tokens_total")]
print("FOUND " + json.dumps({"texts": texts, "param": param, "counts": counts}), flush=True)
serve.shutdown(); ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(one) is None for one in ("ray", "grpc", "aiohttp")), reason='needs pip install "ray[serve]"'
)
def test_two_replicas_answer_like_one_runtime(artifact: Path, runtime, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(artifact), str(port)],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr
    found = json.loads(lines[0][6:])
    expected = runtime.generate(
        [[n + 5, 9] for n in range(12)], max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert found["texts"] == [one.text for one in expected]
    assert found["param"] == "max_tokens"
    assert len(found["counts"]) == 2
    assert sum(found["counts"]) <= 12 * 20
