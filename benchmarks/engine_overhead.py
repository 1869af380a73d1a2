"""What the onnxruntime engine adds to a bare `session.run_with_iobinding`, token by token.

    python benchmarks/engine_overhead.py ARTEFACT [--prompt 128] [--tokens 64] [--rounds 5] [--json FILE]

The artefact is one of the dialect `"onnxruntime"`. Both sides use the very same session. The bare one has all
its inputs and outputs bound, and only the run itself is timed; of the engine all of `forward` is. They take turns
within each token, first the one, then the other, so that a machine that slows down slows both.
A round gives the median over its tokens; the figures are the median, the least and the largest round.
"""

import argparse
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from lmopt.artifact import Artifact
from lmopt.backends.onnxruntime.binding import Binding
from lmopt.backends.onnxruntime.engine import open_engine
from lmopt.backends.onnxruntime.rooms import Room
from lmopt.backends.onnxruntime.session import ort
from lmopt.backends.onnxruntime.shared_cache import SharedCacheEngine
from lmopt.contracts import EngineRequest
from lmopt.evaluation import Figure
from lmopt.evaluation.speed import random_prompts
from lmopt.platform import machine
from lmopt.signature import ATTENTION_MASK


class Bare:
    """A row whose runs are timed alone: everything is bound before the clock starts."""

    def __init__(self, engine: SharedCacheEngine, capacity: int) -> None:
        graph = engine._graph
        self._session = graph.session()
        self._room = Room(graph.signature.state, 1, capacity)
        self._binding = Binding(graph, self._room, 0, 1)
        self._logits = np.empty((1, 1, engine.facts.vocab_size), graph.dtype)
        self._ones = np.ones(capacity, np.int64)
        self._length = 0

    def read(self, ids: Any) -> None:
        """Read a prompt."""
        whole = (
            self._logits
            if self._binding._graph.keeps_logits
            else np.empty((1, ids.shape[1], self._logits.shape[2]), self._logits.dtype)
        )
        self._binding.run(ids, np.array([self._length]), np.array([ids.shape[1]]), whole)
        self._length += ids.shape[1]

    def step(self, token: Any) -> float:
        """Read one token; give the seconds of the run."""
        self._length += 1
        io = self._binding._io
        assert io is not None  # it is not closed
        io.bind_ortvalue_input(
            ATTENTION_MASK, ort.OrtValue.ortvalue_from_numpy(self._ones[None, : self._length])
        )
        self._binding._ids[...] = token
        began = time.perf_counter()
        self._session.run_with_iobinding(io)
        return time.perf_counter() - began


def one_round(engine: SharedCacheEngine, prompt: int, tokens: int) -> tuple[float, float, float]:
    """Decode on both sides.

    Returns:
        Median milliseconds a token of the bare session and of the engine, and the median difference.
    """
    capacity = prompt + tokens + 1
    ids = random_prompts(engine.facts, [prompt])[0][None]
    bare, one = Bare(engine, capacity), np.ones(1, np.int64)
    bare.read(ids)
    logits, state = engine.forward(
        ids, np.array([prompt]), engine.begin(1, capacity=capacity), last_only=True
    )
    times = np.zeros((tokens, 2))
    token = logits[:, -1].argmax(axis=-1)[:, None]
    bare.read(token)  # the first call of another width binds anew
    logits, state = engine.forward(token, one, state, last_only=True)
    gc.collect()
    gc.disable()
    for step in range(tokens - 1):
        token = logits[:, -1].argmax(axis=-1)[:, None]
        if step % 2:
            times[step, 0] = bare.step(token)
        began = time.perf_counter()
        logits, state = engine.forward(token, one, state, last_only=True)
        times[step, 1] = time.perf_counter() - began
        if not step % 2:
            times[step, 0] = bare.step(token)
    gc.enable()
    times = times[: tokens - 1] * 1e3
    bare_ms, ours_ms = np.median(times, axis=0)
    return float(bare_ms), float(ours_ms), float(np.median(times[:, 1] - times[:, 0]))


def run(folder: Path, prompt: int, tokens: int, rounds: int, threads: int | None) -> dict[str, Any]:
    """Measure an artefact.

    Returns:
        Plain values: `machine`, `load_average`, and milliseconds a token by round.
    """
    artifact = Artifact.open(folder, verify=False)
    engine = open_engine(EngineRequest(facts=artifact.facts, artifact=artifact, threads=threads))
    if not isinstance(engine, SharedCacheEngine):
        raise SystemExit(f"{folder} is not of the dialect 'onnxruntime': export it with that target")
    before = os.getloadavg()
    one_round(engine, prompt, tokens)
    laps = [one_round(engine, prompt, tokens) for _ in range(rounds)]
    return {
        "machine": machine(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "threads": engine.report().threads,
        "bare_ms": [lap[0] for lap in laps],
        "ours_ms": [lap[1] for lap in laps],
        "added_us": [lap[2] * 1e3 for lap in laps],
        "share_percent": [100 * lap[2] / lap[1] for lap in laps],
    }


def main() -> None:
    """Measure, and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    asked = parser.parse_args()
    result = run(asked.artefact, asked.prompt, asked.tokens, asked.rounds, asked.threads)
    print(f"bare run   {Figure.of(result['bare_ms'])} ms a token")
    print(f"forward    {Figure.of(result['ours_ms'])} ms a token")
    print(f"added      {Figure.of(result['added_us'])} us a token")
    print(f"our share  {Figure.of(result['share_percent'])} % of a token's time")
    print(f"median (least .. most) of {asked.rounds} rounds; load average {result['load_average']}")
    print(result["machine"])
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
