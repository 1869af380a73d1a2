"""Measure what one engine needs by itself: a fresh process opens the model and generates.

The process that compares engines holds all of them at once, so its own memory says nothing of any one.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

_LIMIT_S: Final = 300


def footprint(
    source: str | os.PathLike[str], *, prompt_tokens: int = 16, new_tokens: int = 16, **options: Any
) -> dict[str, Any]:
    """Open a source in a process of its own and generate.

    Args:
        source: As for `lmopt.Runtime`.
        prompt_tokens: Tokens of a random prompt.
        new_tokens: Tokens to generate, at least 2.
        **options: Of `lmopt.Runtime`, plain values only.

    Returns:
        `peak_bytes` (most resident memory of the process, Python included) and `load_s` (seconds to open,
        imports included); or `problem`, why there are none.
    """
    order = {"source": os.fspath(source), "prompt": prompt_tokens, "new": new_tokens, "options": options}
    command = [sys.executable, "-m", "lmopt.cli.footprint", json.dumps(order)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"took more than {_LIMIT_S} s"}
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"problem": words[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(order: Mapping[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    from lmopt.evaluation import measure_speed, peak_memory_bytes
    from lmopt.runtime import Runtime

    with Runtime(order["source"], **order["options"]) as runtime:
        seconds = time.perf_counter() - began
        measure_speed(
            runtime.engine, prompt_tokens=order["prompt"], new_tokens=order["new"], rounds=1, warm_up=0
        )
    return {"peak_bytes": peak_memory_bytes(), "load_s": seconds}


if __name__ == "__main__":
    # On a line of its own: engines may have printed before.
    sys.stdout.write("\n" + json.dumps(_measure(json.loads(sys.argv[1]))) + "\n")
